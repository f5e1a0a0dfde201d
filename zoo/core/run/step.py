"""One optimizer step. Nothing in it knows what is parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoo.core.contracts.batch import Batch
from zoo.core.contracts.parallel import Counts, ForwardBackward
from zoo.core.run.forward_backward import OneByOne
from zoo.core.run.optim import clip_gradients, set_learning_rate


@dataclass(slots=True)
class TrainState:
    """What a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    lr: float
    clip: float
    step: int = 0
    forward_backward: ForwardBackward = field(default_factory=OneByOne)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss, gradient norm and what the model reports stay on the device until somebody reads them."""

    loss: Tensor | None
    """This rank's part of the loss, 0-dim: the mean over all trained tokens, and over rows what counts once a row.

    None, on every rank, if no token of the step is trained; then there is no gradient and no report either.
    """
    grad_norm: Tensor | None
    lr: float
    report: Mapping[str, Tensor] = field(default_factory=dict)
    """This rank's part of the model's own metrics, 0-dim or vectors, means over the rows or tokens of the step."""


def train_step(state: TrainState, batches: Sequence[Batch], counts: Counts) -> StepResult:
    """Gradients of the mean loss over the trained tokens and rows of all ranks, then one update.

    Sums divided by a global count make the result independent of ranks and microbatches. A step without a trained
    token has no mean: nothing is computed, weights and moments stay, and the schedule moves on.
    """
    lr = state.lr * state.schedule(state.step)
    if counts.trained_tokens == 0:
        state.step += 1
        return StepResult(loss=None, grad_norm=None, lr=lr)
    set_learning_rate(state.optimizer, lr)
    strategy = state.forward_backward
    sums = strategy.run(state.model, batches, counts)
    grad_norm = clip_gradients(state.model, state.clip, repeated=strategy.repeated(), whole_norm=strategy.whole_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    # A rank may hold no part of the loss.
    loss = sums.loss if sums.loss is not None else torch.zeros_like(grad_norm)
    return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, report=sums.report)
