"""AdamW, its learning-rate schedule and the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from zoo.core.job.job import OptimSection, ScheduleSection


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

    The norm is global whatever the shards are: it is taken of parameters that are cut alike, reduced over what cuts
    them, and every parameter is in one such group, so each counts once. `repeated` names those that other ranks
    count, and `whole_norm` takes a rank's norm to that of all ranks where they hold different parameters. One scale
    serves all.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
    cut_alike: dict[tuple[tuple[int, ...], ...], tuple[Sequence[ProcessGroup], list[Tensor]]] = {}
    for name, parameter in parameters.items():
        if name not in repeated and parameter.grad is not None:
            groups = _cutting(parameter)
            # By their ranks: meshes that were made one after another may have groups of their own for the same.
            ranks = tuple(tuple(dist.get_process_group_ranks(group)) for group in groups)
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            cut_alike.setdefault(ranks, (groups, []))[1].append(local)
    norm = whole_norm(torch.nn.utils.get_total_norm([_whole_norm(*alike) for alike in cut_alike.values()]))
    if limit > 0:
        for group in _by_mesh(list(parameters.values())):
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def _cutting(parameter: nn.Parameter) -> tuple[ProcessGroup, ...]:
    """The groups of ranks that hold a parameter in parts."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements
    return tuple(mesh.get_group(d) for d, p in enumerate(placements) if mesh.size(d) > 1 and not p.is_replicate())


def _whole_norm(groups: Sequence[ProcessGroup], parts: Sequence[Tensor]) -> Tensor:
    """The 2-norm of gradients that these groups hold in parts, with the same bits on every rank."""
    square = torch.nn.utils.get_total_norm(parts).square()
    for group in groups:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups of one mesh each, in order of first appearance; plain tensors are one group."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())
