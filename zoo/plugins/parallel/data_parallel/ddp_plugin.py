"""Replicated data parallelism over dp_replicate x dp_shard x cp."""

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> list[ParallelAdapterEntry]:
    """Offer `ddp`."""
    return [
        ParallelAdapterEntry(
            name="ddp",
            target="zoo.plugins.parallel.data_parallel.ddp:ReplicatedData",
            axes=("dp_replicate", "dp_shard"),
            help="weights, gradients and optimizer state on every rank; gradients summed once a step",
        )
    ]
