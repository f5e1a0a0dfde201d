"""FSDP2 on the plan's blocks: each rank keeps 1/(dp_shard x cp) of weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from zoo.core.contracts import LayoutRequest, ParallelPlan, Phase, Setup
from zoo.core.seams import find

if TYPE_CHECKING:
    from zoo.core.batch import Batch
    from zoo.core.mesh import Mesh


class FullyShardedData:
    """`fully_shard` of every block and of the root, summing gradients."""

    name: ClassVar[str] = "fsdp"
    axes: ClassVar[tuple[str, ...]] = ("dp_shard", "cp")
    phase: ClassVar[Phase] = Phase.WRAP

    def check(self, request: LayoutRequest) -> str | None:
        """Any degree works: FSDP2 shards unevenly."""
        return None

    def applies(self, degrees: Mapping[str, int], setup: Setup) -> bool:
        """Also on one rank when arithmetic and weights differ in type: FSDP2 then does the casting."""
        return degrees["dp_shard"] * degrees["cp"] > 1 or setup.dtype != setup.master_dtype

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> nn.Module:
        """Shard in place. Losses are sums over a global count, so gradients add up: FSDP2's mean is off."""
        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, setup.dtype), reduce_dtype=getattr(torch, setup.master_dtype)
        )
        for name in find(model, plan.block):
            fully_shard(model.get_submodule(name), mesh=mesh["fsdp"], mp_policy=precision)
        fully_shard(model, mesh=mesh["fsdp"], mp_policy=precision)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, setup: Setup) -> Batch:
        """Unchanged: the feed gives each data-parallel rank its own rows."""
        return batch
