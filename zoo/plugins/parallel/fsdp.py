"""FSDP2 on the plan's blocks: each rank keeps 1/(dp_shard x cp) of weights, gradients and optimizer state.

Experts are units of their own inside their block: dealt out over `ep`, they are sharded over what is left, `efsdp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from zoo.core.contracts import ExpertShape, LayoutRequest, ParallelPlan, Phase, Setup
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
        """None for dense models, for FSDP2 shards dim 0 unevenly; or why experts cannot be cut so."""
        ep, ranks = request.degrees["ep"], request.degrees["dp_shard"] * request.degrees["cp"]
        if ep == 1 or request.experts is None or _divides(request.experts, ranks // ep):
            return None
        shape = request.experts
        able = [
            d for d in range(2, ranks + 1) if ranks % d == shape.num_experts % d == 0 and _divides(shape, ranks // d)
        ]
        return (
            f"--ep {ep} leaves dp_shard x cp / ep = {ranks // ep} ranks to share each expert, whose widths "
            f"{shape.hidden_size} and {shape.intermediate_size} are no multiples of that: only dim 0 may be cut "
            f"unevenly, and ep has it; type --ep {min(able, key=lambda d: abs(d - ep), default=1)}"
        )

    def applies(self, degrees: Mapping[str, int], setup: Setup) -> bool:
        """Also on one rank when arithmetic and weights differ in type: FSDP2 then does the casting."""
        return degrees["dp_shard"] * degrees["cp"] > 1 or setup.dtype != setup.master_dtype

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> nn.Module:
        """Shard in place. Losses are sums over a global count, so gradients add up: FSDP2's mean is off."""
        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, setup.dtype), reduce_dtype=getattr(torch, setup.master_dtype)
        )
        experts = [name for glob in plan.expert for name in find(model, glob)]
        for name in experts:
            module = model.get_submodule(name)
            fully_shard(module, mesh=mesh["efsdp"], mp_policy=precision, shard_placement_fn=_across(mesh.size("efsdp")))
        for name in find(model, plan.block):
            block = fully_shard(model.get_submodule(name), mesh=mesh["fsdp"], mp_policy=precision)
            # The router makes the host wait in the middle of the block, too late to send for weights then.
            block.set_modules_to_forward_prefetch([_unit(model, e) for e in experts if e.startswith(f"{name}.")])
        fully_shard(model, mesh=mesh["fsdp"], mp_policy=precision)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, setup: Setup) -> Batch:
        """Unchanged: the feed gives each data-parallel rank its own rows."""
        return batch


def _divides(experts: ExpertShape, ranks: int) -> bool:
    return experts.hidden_size % ranks == experts.intermediate_size % ranks == 0


def _across(ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Dim 1, so that few experts go over many ranks and `ep` keeps dim 0; dim 0, unevenly, where dim 1 cannot."""
    return lambda parameter: Shard(1 if parameter.ndim > 1 and parameter.shape[1] % ranks == 0 else 0)


def _unit(model: nn.Module, name: str) -> FSDPModule:
    unit = model.get_submodule(name)
    assert isinstance(unit, FSDPModule)
    return unit
