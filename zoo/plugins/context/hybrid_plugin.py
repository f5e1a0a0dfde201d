"""Offers the `hybrid` context scheme."""

from __future__ import annotations

from zoo import ContextSchemeEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="hybrid",
            target="zoo.plugins.context.hybrid:Hybrid",
            help="heads are dealt out among neighbours, K/V go round a ring across; hybrid:4 for groups of 4",
        ),
    )
