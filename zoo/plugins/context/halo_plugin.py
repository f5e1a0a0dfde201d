"""Offers the `halo` context scheme."""

from __future__ import annotations

from zoo import ContextSchemeEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="halo",
            target="zoo.plugins.context.halo:Halo",
            help="for sliding windows: each rank fetches just the rows its windows reach into, in one exchange",
        ),
    )
