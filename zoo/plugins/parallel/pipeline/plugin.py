"""Offers the `pipeline` adapter, which gives the mesh axis `pp` its meaning."""

from __future__ import annotations

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="pipeline",
            target="zoo.plugins.parallel.pipeline.adapter:PipelineParallel",
            help="deal the blocks out over `pp` ranks as stages; microbatches flow through them by a schedule",
            axes=("pp",),
        ),
    )
