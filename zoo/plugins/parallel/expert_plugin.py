"""Offers the `expert` adapter, which gives the mesh axis `ep` its meaning."""

from __future__ import annotations

from zoo.core.entries import ParallelAdapterEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="expert",
            target="zoo.plugins.parallel.expert:ExpertParallel",
            help="deal the experts of a mixture out over `ep` ranks; tokens travel to them and back",
            axes=("ep",),
        ),
    )
