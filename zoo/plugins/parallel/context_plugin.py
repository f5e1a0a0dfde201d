"""Offers the `context` adapter, which gives the mesh axis `cp` its meaning."""

from __future__ import annotations

from zoo.core.entries import ParallelAdapterEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="context",
            target="zoo.plugins.parallel.context:ContextParallel",
            help="cut each row of tokens over the ranks of `cp`; attention reaches the rest by a context scheme",
            axes=("cp",),
        ),
    )
