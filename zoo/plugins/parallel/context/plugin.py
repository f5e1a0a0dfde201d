"""Offers the `context` adapter, which gives the mesh axis `cp` its meaning."""

from __future__ import annotations

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="context",
            target="zoo.plugins.parallel.context.adapter:ContextParallel",
            help="cut each row of tokens over the ranks of `cp`; attention reaches the rest by a context scheme",
            axes=("cp",),
        ),
    )
