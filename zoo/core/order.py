"""From a model on meta to this rank's part of it: the one place and the one order of adapters and policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from zoo.core import weights
from zoo.core.answers import adapter_named, changed, check_order
from zoo.core.attention.seam import AttentionSeam
from zoo.core.contracts import AttentionBackend, MemoryPolicy, ModelSpec, ParallelAdapter, ParallelPlan, Phase, Setup
from zoo.core.forward_backward import Completed, ForwardBackward, OneByOne, Scheduler
from zoo.core.seams import find, swap

if TYPE_CHECKING:
    from zoo.core.mesh import Mesh


@runtime_checkable
class Accumulating(Protocol):
    """An adapter that treats the last microbatch of a step otherwise than those before it."""

    def begin_microbatch(self, model: nn.Module, *, last: bool) -> None:
        """Called with the built model before each microbatch's forward."""


@runtime_checkable
class Completing(Protocol):
    """An adapter whose ranks have parts of gradients until a step's last backward is done."""

    def complete_gradients(self, model: nn.Module, mesh: Mesh, setup: Setup) -> None:
        """Called on every rank once a step, before the gradients' norm is taken: add the parts up in place."""


def build(
    spec: ModelSpec,
    config: Any,
    *,
    mesh: Mesh,
    setup: Setup,
    backend: AttentionBackend,
    adapters: Sequence[ParallelAdapter],
    policy: MemoryPolicy,
    device: torch.device,
) -> nn.Module:
    """This rank's model with storage but without values.

    `adapters` are those that apply. Raises UsageError if a glob of the plan matches nothing.
    """
    with torch.device("meta"):
        model = spec.build(config).to(getattr(torch, setup.master_dtype))
    plan = spec.plan(config)
    for glob in (plan.block, *plan.tensor, *plan.expert, *plan.seams.values(), *plan.first, *plan.last):
        find(model, glob)
    swap(model, plan.seams["attention"], lambda old: _seam(old, backend), owner="core")
    steps: list[tuple[Phase, str, Any]] = [
        (adapter.phase, adapter.name, lambda m, a=adapter: changed(adapter_named(a), a.apply(m, plan, mesh, setup)))
        for adapter in adapters
    ]
    who = f"memory policy '{policy.name}'"
    steps.append((Phase.RECOMPUTE, policy.name, lambda m: changed(who, policy.apply(m, plan))))
    for _phase, _name, apply in sorted(steps, key=lambda step: step[:2]):
        model = apply(model)
    weights.allocate(model, device)
    spec.init_buffers(model, config)
    return model


def forward_backward(
    model: nn.Module, plan: ParallelPlan, *, mesh: Mesh, setup: Setup, adapters: Sequence[ParallelAdapter]
) -> ForwardBackward:
    """How a built model is stepped: by the adapter that has an order of its own, else microbatch by microbatch."""
    scheduler = next((adapter for adapter in adapters if isinstance(adapter, Scheduler)), None)
    strategy: ForwardBackward = OneByOne(_microbatch_hook(model, adapters), family=setup.model)
    if scheduler is not None:
        strategy = check_order(scheduler, scheduler.forward_backward(model, plan, mesh, setup))
    for adapter in adapters:
        if isinstance(adapter, Completing):
            strategy = Completed(strategy, partial(adapter.complete_gradients, model, mesh, setup))
    return strategy


def _microbatch_hook(model: nn.Module, adapters: Sequence[ParallelAdapter]) -> Callable[[bool], None]:
    """What a step calls before each microbatch, told whether it is the last."""
    told = [adapter for adapter in adapters if isinstance(adapter, Accumulating)]

    def begin(last: bool) -> None:
        for adapter in told:
            adapter.begin_microbatch(model, last=last)

    return begin


def _seam(core: nn.Module, backend: AttentionBackend) -> AttentionSeam:
    """The seam in place of a family's own core, whose attribute `window`, if any, is the layer's sliding window."""
    return AttentionSeam(backend, window=getattr(core, "window", None))
