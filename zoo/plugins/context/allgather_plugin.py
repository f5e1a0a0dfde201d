"""Offers the `allgather` context scheme."""

from __future__ import annotations

from zoo import ContextSchemeEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="allgather",
            target="zoo.plugins.context.allgather:Allgather",
            help="each rank fetches the K/V rows its queries see from their owners, some heads at a time",
        ),
    )
