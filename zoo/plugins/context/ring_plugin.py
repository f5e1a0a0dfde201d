"""Offers the `ring` context scheme, and chooses it for `--cp-scheme auto` when no other plugin chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.core.entries import ContextSchemeEntry
from zoo.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from zoo.core.contracts import LayoutRequest


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="ring",
            target="zoo.plugins.context.ring:Ring",
            help="K/V travel from neighbour to neighbour while the last ones are used; two buffers at any degree",
        ),
    )


@hookimpl(trylast=True)
def zoo_select_context_scheme(request: LayoutRequest, candidates: Sequence[str]) -> str | None:
    return "ring" if "ring" in candidates else None
