"""What the data-parallel adapters share: the units they work on, one after another, and sums instead of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from zoo import ExpertShape, Layout, ParallelAdapter, ParallelPlan, Phase, find_modules

if TYPE_CHECKING:
    from zoo import Mesh


class DataParallel(ParallelAdapter):
    """What an adapter is that `layout.data_parallel` may name: how weights live over dp_replicate x dp_shard x cp."""

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]] = ("dp_replicate", "dp_shard")
    """The axes whose ranks work on rows of their own. Those of `cp` hold weights alike; what cuts rows is another's."""
    phase: ClassVar[Phase] = Phase.WRAP

    def applies(self, layout: Layout) -> bool:
        """Also on one rank when arithmetic and weights differ in type: FSDP2 then does the casting."""
        degrees = layout.degrees
        ranks = degrees.dp * degrees.cp
        return layout.settings.data_parallel == self.name and (ranks > 1 or casts(layout))


class DataParallelOnceAStep(DataParallel):
    """One that keeps weights whole, and gradients where they are, until a step's last backward."""

    keeps_weights_for_a_step: ClassVar[bool] = True

    def begin_microbatch(self, model: nn.Module, *, last: bool) -> None:
        """Before the last nothing is reduced and no weight given up; after it both, for weights will change."""
        unit = root(model)
        unit.set_requires_gradient_sync(last)
        unit.set_reshard_after_backward(last)


def precision(layout: Layout) -> MixedPrecisionPolicy:
    """Weights in the master type, arithmetic in another, gradients reduced and added up in the master type."""
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, layout.dtype), reduce_dtype=getattr(torch, layout.master_dtype)
    )


def casts(layout: Layout) -> bool:
    """Whether arithmetic and weights differ in type, which takes an adapter even on one rank."""
    return layout.dtype != layout.master_dtype


def wrap(
    model: nn.Module,
    plan: ParallelPlan,
    *,
    expert: Callable[[nn.Module], object],
    dense: Callable[[nn.Module], object],
    ahead: int = 1,
) -> None:
    """Give experts, then blocks, then the root to `expert` and `dense`, which make FSDPModules of them in place.

    A block asks for the weights of `ahead` blocks after it, and in backward of so many before it.

    Losses are sums over a global count, so gradients add up: the mean over ranks is turned off everywhere.
    """
    experts = [name for glob in plan.expert for name in find_modules(model, glob)]
    for name in experts:
        expert(model.get_submodule(name))
    for name in find_modules(model, plan.block):
        dense(model.get_submodule(name))
    dense(model)
    blocks = find_modules(model, plan.block)
    for at, name in enumerate(blocks):
        # The router makes the host wait in the middle of the block, too late to send for weights then.
        inside = [e for e in experts if e.startswith(f"{name}.")]
        # FSDP2 gathers one block ahead by itself.
        after, before = (blocks[at + 1 : at + 1 + ahead], blocks[max(0, at - ahead) : at]) if ahead > 1 else ([], [])
        _unit(model.get_submodule(name)).set_modules_to_forward_prefetch(_units(model, [*inside, *after]))
        _unit(model.get_submodule(name)).set_modules_to_backward_prefetch(_units(model, before[::-1]))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def shard(model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout, *, reshard: bool) -> None:
    """`fully_shard` of every unit: over dp_shard x cp, experts over what `ep` leaves of it, copied over dp_replicate.

    With `reshard` weights are given up after a block's forward and gathered again for its backward.
    """
    policy, after = precision(layout), None if reshard else False
    placement = _across(mesh.size("efsdp"))
    wrap(
        model,
        plan,
        expert=lambda unit: fully_shard(
            unit, mesh=mesh["ehsdp"], mp_policy=policy, reshard_after_forward=after, shard_placement_fn=placement
        ),
        dense=lambda unit: fully_shard(unit, mesh=mesh["hsdp"], mp_policy=policy, reshard_after_forward=after),
        ahead=layout.settings.prefetch,
    )


def sharding_objection(layout: Layout) -> str | None:
    """None for dense models, for FSDP2 shards dim 0 unevenly; or why experts cannot be cut so."""
    ep, ranks = layout.degrees.ep, layout.degrees.dp_shard * layout.degrees.cp
    if ep == 1 or layout.model.experts is None or _divides(layout.model.experts, ranks // ep):
        return None
    shape = layout.model.experts
    return (
        f"--ep {ep} leaves dp_shard x cp / ep = {ranks // ep} ranks to share each expert, whose widths "
        f"{shape.hidden_size} and {shape.intermediate_size} are no multiples of that: only dim 0 may be cut "
        f"unevenly, and ep has it"
    )


def keeping_objection(layout: Layout, name: str) -> str | None:
    """None, or that layout.reshard=false asks for what is not done otherwise. That the default is true says nothing."""
    if layout.settings.reshard:
        return None
    return f"layout.reshard=false: --data-parallel {name} keeps weights from first forward to last backward anyway"


def root(model: nn.Module) -> FSDPModule:
    """The model itself, the outermost unit."""
    return _unit(model)


def _divides(experts: ExpertShape, ranks: int) -> bool:
    return experts.hidden_size % ranks == experts.intermediate_size % ranks == 0


def _across(ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Dim 1, so that few experts go over many ranks and `ep` keeps dim 0; dim 0, unevenly, where dim 1 cannot."""
    return lambda parameter: Shard(1 if parameter.ndim > 1 and parameter.shape[1] % ranks == 0 else 0)


def _units(model: nn.Module, names: Sequence[str]) -> list[FSDPModule]:
    return [_unit(model.get_submodule(name)) for name in names]


def _unit(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
