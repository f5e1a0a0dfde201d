"""From the microbatches of a step to gradients: the one part of a step that a layout may put in another order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from zoo.core.batch import Batch
from zoo.core.contracts import Losses
from zoo.core.model_answers import check_losses


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step's sums are divided by: global counts, so that ranks and microbatches do not matter."""

    trained_tokens: int
    rows: int
    document_tokens: int
    """Those that are no padding."""

    def share(self, batch: Batch) -> float:
        """The part of the step's rows that a microbatch is."""
        return batch.num_rows / self.rows

    def loss(self, losses: Losses, batch: Batch) -> Tensor:
        """A microbatch's part of the step's loss, 0-dim."""
        loss: Tensor = losses.tokens / self.trained_tokens + losses.rows * self.share(batch)
        return loss


@dataclass(slots=True)
class Sums:
    """This rank's part of a step's loss, None before any, and of what the model reports."""

    loss: Tensor | None = None
    report: dict[str, Tensor] = field(default_factory=dict)

    def add_loss(self, loss: Tensor) -> None:
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def add_report(self, losses: Losses, batch: Batch, counts: Counts, *, weight: float = 1.0) -> None:
        """Add what a model reported of a microbatch; with weight 0 its names are known and its numbers are not."""
        tokens = batch.document_tokens / max(1, counts.document_tokens)
        for report, share in ((losses.report, counts.share(batch)), (losses.token_report, tokens)):
            for name, part in report.items():
                self.report[name] = self.report.get(name, 0.0) + part * (share * weight)


class ForwardBackward(Protocol):
    """Leaves the gradients of a step in a model, and knows which of them other ranks hold."""

    def run(self, model: nn.Module, batches: Sequence[Batch], counts: Counts) -> Sums:
        """Forward and backward of every microbatch."""

    def repeated(self) -> Collection[str]:
        """Names of parameters of which another rank counts the gradient in the norm."""

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm over all ranks that hold other parameters than this one, from the norm of this one's, 0-dim."""


class OneByOne:
    """Each microbatch forward and backward, one after another."""

    def __init__(self, begin_microbatch: Callable[[bool], None] = lambda _last: None, *, family: str = "") -> None:
        """`begin_microbatch` is told before each whether it is the step's last: sums over ranks may wait until then.

        `family` is the model's, for messages.
        """
        self._begin_microbatch = begin_microbatch
        self._family = family
        self._looked = False

    def run(self, model: nn.Module, batches: Sequence[Batch], counts: Counts) -> Sums:
        """As `ForwardBackward.run`."""
        sums = Sums()
        for batch in batches:
            self._begin_microbatch(batch is batches[-1])
            losses = as_losses(model(batch.tokens, batch.positions, batch.mask, batch.labels))
            if not self._looked:
                check_losses(self._family, model, losses, batch.tokens.device)
                self._looked = True
            loss = counts.loss(losses, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            sums.add_loss(loss)
            sums.add_report(losses, batch, counts)
        return sums

    def repeated(self) -> Collection[str]:
        """None: every rank has every parameter, or a shard of it."""
        return ()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Unchanged: every rank has every parameter, or a shard of it."""
        return norm


@dataclass(frozen=True, slots=True)
class Completed:
    """An order, and what completes its gradients once every microbatch is done."""

    inner: ForwardBackward
    complete: Callable[[], None]

    def run(self, model: nn.Module, batches: Sequence[Batch], counts: Counts) -> Sums:
        """As `ForwardBackward.run`."""
        sums = self.inner.run(model, batches, counts)
        self.complete()
        return sums

    def repeated(self) -> Collection[str]:
        """Return those of the order itself."""
        return self.inner.repeated()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Return the order's own norm."""
        return self.inner.whole_norm(norm)


def as_losses(returned: Tensor | Losses) -> Losses:
    """What a model returned with labels; most return their token losses and nothing else."""
    return returned if isinstance(returned, Losses) else Losses(returned)
