"""From a model on meta to this rank's part of it: the one place and the one order of adapters and policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.core.attention.seam import AttentionSeam
from zoo.core.contracts.attention import AttentionBackend
from zoo.core.contracts.globs import find_modules
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import ModelSpec, ParallelPlan
from zoo.core.contracts.parallel import ForwardBackward, MemoryPolicy, ParallelAdapter, Phase
from zoo.core.model.load import allocate
from zoo.core.model.seams import replace_modules
from zoo.core.registry.answers import adapter_named, changed, check_order
from zoo.core.run.forward_backward import Completed, OneByOne

if TYPE_CHECKING:
    from zoo.core.mesh.mesh import Mesh


def build(
    spec: ModelSpec,
    config: Any,
    *,
    mesh: Mesh,
    layout: Layout,
    backend: AttentionBackend,
    adapters: Sequence[ParallelAdapter],
    policy: MemoryPolicy,
    device: torch.device,
) -> nn.Module:
    """This rank's model with storage but without values.

    `adapters` are those that apply. Raises UsageError if a glob of the plan matches nothing.
    """
    with torch.device("meta"):
        model = spec.build(config).to(getattr(torch, layout.master_dtype))
    plan = spec.plan(config)
    for glob in (plan.block, *plan.tensor, *plan.expert, *plan.seams.values(), *plan.first, *plan.last):
        find_modules(model, glob)
    replace_modules(model, plan.seams["attention"], lambda old: _seam(old, backend), owner="core")
    steps: list[tuple[Phase, str, Any]] = [
        (adapter.phase, adapter.name, lambda m, a=adapter: changed(adapter_named(a), a.apply(m, plan, mesh, layout)))
        for adapter in adapters
    ]
    who = f"memory policy '{policy.name}'"
    steps.append((Phase.RECOMPUTE, policy.name, lambda m: changed(who, policy.apply(m, plan))))
    for _phase, _name, apply in sorted(steps, key=lambda step: step[:2]):
        model = apply(model)
    allocate(model, device)
    spec.init_buffers(model, config)
    return model


def forward_backward(
    model: nn.Module, plan: ParallelPlan, *, mesh: Mesh, layout: Layout, adapters: Sequence[ParallelAdapter]
) -> ForwardBackward:
    """Return how a built model is stepped: in the order of the adapter that has one, else one microbatch after another.

    Whatever the order, every adapter completes its gradients at the end of the step.
    """
    orders = ((adapter, adapter.forward_backward(model, plan, mesh, layout)) for adapter in adapters)
    order = next((check_order(adapter, order) for adapter, order in orders if order is not None), None)

    def begin_microbatch(last: bool) -> None:
        for adapter in adapters:
            adapter.begin_microbatch(model, last=last)

    def complete_gradients() -> None:
        for adapter in adapters:
            adapter.complete_gradients(model, plan, mesh, layout)

    return Completed(order or OneByOne(begin_microbatch, family=layout.model.name), complete_gradients)


def _seam(core: nn.Module, backend: AttentionBackend) -> AttentionSeam:
    """The seam in place of a family's own core, whose attribute `window`, if any, is the layer's sliding window."""
    return AttentionSeam(backend, window=getattr(core, "window", None))
