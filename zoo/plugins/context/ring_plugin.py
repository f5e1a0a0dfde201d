"""Offers the `ring` context scheme."""

from __future__ import annotations

from zoo import ContextSchemeEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="ring",
            target="zoo.plugins.context.ring:Ring",
            help="K/V travel from neighbour to neighbour while the last ones are used; two buffers at any degree",
        ),
    )
