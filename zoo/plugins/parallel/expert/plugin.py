"""Offers the `expert` adapter, which gives the mesh axis `ep` its meaning."""

from __future__ import annotations

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="expert",
            target="zoo.plugins.parallel.expert.adapter:ExpertParallel",
            help="deal the experts of a mixture out over `ep` ranks; tokens travel to them and back",
            axes=("ep",),
        ),
    )
