"""Offers the `ulysses` context scheme."""

from __future__ import annotations

from zoo import ContextSchemeEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_context_schemes() -> tuple[ContextSchemeEntry, ...]:
    return (
        ContextSchemeEntry(
            name="ulysses",
            target="zoo.plugins.context.ulysses:Ulysses",
            help="heads are dealt out: one exchange before attention and one after, as many ranks as there are heads",
        ),
    )
