"""Offers the `tensor` adapter, which gives the mesh axis `tp` its meaning."""

from __future__ import annotations

from zoo import ParallelAdapterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_parallel_adapters() -> tuple[ParallelAdapterEntry, ...]:
    return (
        ParallelAdapterEntry(
            name="tensor",
            target="zoo.plugins.parallel.tensor.adapter:TensorParallel",
            help="cut matrices, vocabulary and heads over the ranks of `tp`, norms and the residual by tokens",
            axes=("tp",),
        ),
    )
