"""Offers the `halo` context scheme."""

from __future__ import annotations

from zoo.core.entries import ContextSchemeEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="halo",
            target="zoo.plugins.context.halo:Halo",
            help="for sliding windows: each rank fetches just the rows its windows reach into, in one exchange",
        ),
    )
