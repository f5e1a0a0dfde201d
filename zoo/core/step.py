"""One optimizer step. Nothing in it knows what is parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.core.batch import Batch
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


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and gradient norm stay on the device until somebody reads them."""

    loss: Tensor
    """This rank's part of the mean over all trained tokens, 0-dim; the parts add up to the loss."""
    grad_norm: Tensor
    lr: float


def train_step(state: TrainState, batches: Sequence[Batch], trained_tokens: int) -> StepResult:
    """Gradients of the mean loss over `trained_tokens` (the global count), then one update.

    Sums divided by a global count make the result independent of ranks and microbatches.
    """
    lr = state.lr * state.schedule(state.step)
    set_learning_rate(state.optimizer, lr)
    total: Tensor | None = None
    for batch in batches:
        loss = state.model(batch.tokens, batch.positions, batch.mask, batch.labels) / max(1, trained_tokens)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None, "a step needs at least one microbatch"
    grad_norm = clip_gradients(state.model, state.clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepResult(loss=total, grad_norm=grad_norm, lr=lr)
