"""Fully sharded data parallelism over dp_shard x cp, and its copies over dp_replicate."""

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> list[ParallelAdapterEntry]:
    """Offer `fsdp`."""
    return [
        ParallelAdapterEntry(
            name="fsdp",
            target="zoo.plugins.parallel.data_parallel.fsdp:FullyShardedData",
            axes=("dp_replicate", "dp_shard"),
            help="weights, gradients and optimizer state sharded over dp_shard x cp (FSDP2); copies over dp_replicate",
        )
    ]
