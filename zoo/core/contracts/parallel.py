"""Contracts of what changes a built model from outside: parallel adapters, their order of a step, memory policies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zoo.core.contracts.account import Account
    from zoo.core.contracts.batch import Batch
    from zoo.core.contracts.layout import Layout
    from zoo.core.contracts.models import Losses, ModelConfig, ParallelPlan
    from zoo.core.mesh.mesh import Mesh


# Layout and memory --------------------------------------------------------------------------------

StatePart = Literal["weights", "gradients", "optimizer"]
"""Of what a rank holds between a backward and the optimizer's step."""


class Phase(IntEnum):
    """Order of application. Mathematics fixes it, so core sorts by it and plugin order never matters."""

    SPLIT = 10
    """Pipeline: keep this stage."""
    SHARD = 20
    """Tensor and expert parallel: place parameters."""
    EXCHANGE = 30
    """Context parallel: replace the attention seam."""
    RECOMPUTE = 40
    """Memory policies."""
    COMPILE = 50
    WRAP = 60
    """Data parallel last: it must see the final parameters."""


class ParallelAdapter:
    """Base class of adapters: how one kind of parallelism changes a built model, from outside.

    Override what the adapter needs. Every other method does nothing.
    """

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    """The mesh axes whose ranks it gives a meaning to."""
    phase: ClassVar[Phase]
    keeps_weights_for_a_step: ClassVar[bool] = False
    """Whether weights stay whole, and gradients stay on their rank, until a step's last backward."""

    def check(self, layout: Layout) -> str | None:
        """Return None, or why this layout cannot work. Host only and cheap: it is asked often."""
        return None

    def applies(self, layout: Layout) -> bool:
        """Return whether there is anything to do: by default, whether one of its axes has more than one rank."""
        return any(layout.degrees[axis] > 1 for axis in self.axes)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Change the model in place, or wrap it, for this rank. Called only if the adapter applies."""
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, layout: Layout) -> Batch:
        """Return this rank's part of a batch. By default all ranks of its axes get the same."""
        return batch

    def forward_backward(
        self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout
    ) -> ForwardBackward | None:
        """Return the adapter's own order of forward and backward, for the model that `apply` and all later adapters
        left; None leaves core's order, one microbatch after another."""
        return None

    def begin_microbatch(self, model: nn.Module, *, last: bool) -> None:
        """Prepare for a microbatch's forward, with the built model. `last` says whether it is the step's last."""

    def complete_gradients(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> None:
        """Add up in place what gradients lack after a step's last backward. Called before their norm is taken."""

    def whole(self, layout: Layout) -> Collection[StatePart]:
        """Return what every rank holds whole for a step, not cut over dp_shard x cp.

        `weights` are those of the arithmetic's type. Only a data-parallel adapter has something to say.
        """
        return ()

    def account(self, account: Account) -> None:
        """Add what this rank sends in a step, and change `account` as `apply` changes the model. Host only."""


class MemoryPolicy(Protocol):
    """One way to trade memory for time or traffic."""

    name: str

    def apply(self, model: nn.Module, plan: ParallelPlan) -> nn.Module:
        """Replace seams of the model."""

    def saved_bytes(self, config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
        """Activation bytes a rank with that many tokens keeps for backward."""


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
