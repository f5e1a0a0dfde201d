"""AdamW, its learning-rate schedule and the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from zoo.core.job import OptimSection, ScheduleSection


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); matrices decay, vectors (norms, biases) do not.

    A group holds parameters of one mesh, for torch updates a whole group in one call.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = _by_mesh([p for p in trained if p.ndim > 1])
    vectors = _by_mesh([p for p in trained if p.ndim <= 1])
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": section.weight_decay} for group in matrices]
        + [{"params": group, "weight_decay": 0.0} for group in vectors],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=True,
    )


def build_schedule(section: ScheduleSection) -> Callable[[int], float]:
    """The share of the learning rate at a step, counted from 0: linear warm-up, then decay to `final` at the last."""
    warmup = section.warmup if section.warmup is not None else max(1, round(0.03 * section.steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, section.steps - 1 - warmup)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))), "linear": 1 - min(done, 1.0), "constant": 1.0}
        return section.final + (1 - section.final) * left[section.decay]

    return share


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(
    model: nn.Module,
    limit: float,
    *,
    repeated: Collection[str] = (),
    whole_norm: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """Scale gradients so that their global 2-norm is at most `limit` (0: never); returns the norm before, 0-dim.

    The norm is global whatever the shards are: it is taken of each mesh's parameters, reduced over that mesh, and
    every parameter is on one mesh, so each counts once. `repeated` names those that other ranks count, and
    `whole_norm` takes a rank's norm to that of all ranks where they hold different parameters. One scale serves all.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
    counted = _by_mesh([p for name, p in parameters.items() if name not in repeated])
    norm = whole_norm(torch.nn.utils.get_total_norm([_whole_norm(group) for group in counted]))
    if limit > 0:
        for group in _by_mesh(list(parameters.values())):
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def _whole_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of the gradients of parameters on one mesh, on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups of one mesh each, in order of first appearance; plain tensors are one group."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())
