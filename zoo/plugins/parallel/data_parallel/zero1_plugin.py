"""The distributed optimizer over dp_shard x cp."""

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> list[ParallelAdapterEntry]:
    """Offer `zero1`."""
    return [
        ParallelAdapterEntry(
            name="zero1",
            target="zoo.plugins.parallel.data_parallel.zero1:ShardedOptimizer",
            axes=("dp_replicate", "dp_shard"),
            help="optimizer state sharded over dp_shard x cp, weights and gradients whole during a step",
        )
    ]
