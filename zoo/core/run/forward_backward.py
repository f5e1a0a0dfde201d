"""From the microbatches of a step to gradients: the one part of a step that a layout may put in another order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zoo.core.contracts.batch import Batch
from zoo.core.contracts.models import Losses
from zoo.core.contracts.parallel import Counts, ForwardBackward, Sums
from zoo.core.model.answers import check_losses


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
