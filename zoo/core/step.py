"""One optimizer step. Nothing in it knows what is parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoo.core.batch import Batch
from zoo.core.contracts import Losses
from zoo.core.optim import clip_gradients, set_learning_rate


@dataclass(slots=True)
class TrainState:
    """What a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    lr: float
    clip: float
    step: int = 0
    begin_microbatch: Callable[[bool], None] = lambda _last: None
    """Told before each microbatch whether it is the step's last: sums over ranks may wait until then."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss, gradient norm and what the model reports stay on the device until somebody reads them."""

    loss: Tensor
    """This rank's part of the loss, 0-dim: the mean over all trained tokens, and over rows what counts once a row."""
    grad_norm: Tensor
    lr: float
    report: Mapping[str, Tensor] = field(default_factory=dict)
    """This rank's part of the model's own metrics, 0-dim or vectors, means over the rows of the step."""


def train_step(state: TrainState, batches: Sequence[Batch], trained_tokens: int, global_rows: int) -> StepResult:
    """Gradients of the mean loss over `trained_tokens` and `global_rows` (global counts), then one update.

    Sums divided by a global count make the result independent of ranks and microbatches.
    """
    lr = state.lr * state.schedule(state.step)
    set_learning_rate(state.optimizer, lr)
    total: Tensor | None = None
    report: dict[str, Tensor] = {}
    for batch in batches:
        state.begin_microbatch(batch is batches[-1])
        losses = _losses(state.model(batch.tokens, batch.positions, batch.mask, batch.labels))
        share = batch.num_rows / global_rows
        loss: Tensor = losses.tokens / max(1, trained_tokens) + losses.rows * share
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
        for name, part in losses.report.items():
            report[name] = report.get(name, 0.0) + part * share
    assert total is not None, "a step needs at least one microbatch"
    grad_norm = clip_gradients(state.model, state.clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepResult(loss=total, grad_norm=grad_norm, lr=lr, report=report)


def _losses(returned: Tensor | Losses) -> Losses:
    """What a model returned with labels; most return their token losses and nothing else."""
    return returned if isinstance(returned, Losses) else Losses(returned)
