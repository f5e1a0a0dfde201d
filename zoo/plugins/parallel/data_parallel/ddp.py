"""Replicated data parallelism: every rank of dp_replicate x dp_shard x cp holds weights and optimizer state whole.

Gradients add up on the rank over a step's microbatches and are all-reduced once, a bucket a block, while the last
backward goes on. torch's composable `replicate` does it: parameters become DTensors that say they are replicated, so
names stay, the gradient norm counts them once, and they may be cut by other axes besides.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate

from zoo import Layout, LayoutSection, ParallelPlan, StatePart
from zoo.plugins.parallel.data_parallel import units
from zoo.plugins.parallel.data_parallel.traffic import account_replicated

if TYPE_CHECKING:
    from zoo import Account, Mesh


class ReplicatedData(units.DataParallelOnceAStep):
    """`replicate` of every block and of the root, summing gradients."""

    name: ClassVar[str] = "ddp"

    def check(self, layout: Layout) -> str | None:
        """None, or why weights cannot be given up or gathered ahead: they are never cut."""
        if layout.settings.prefetch != LayoutSection().prefetch:
            return f"layout.prefetch={layout.settings.prefetch}: --data-parallel {self.name} gathers no weights"
        return units.keeping_objection(layout, self.name)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Replicate in place; experts over the ranks that hold the same ones."""
        policy = units.precision(layout)
        units.wrap(
            model,
            plan,
            expert=lambda unit: replicate(unit, mesh=mesh["eddp"], mp_policy=policy),
            dense=lambda unit: replicate(unit, mesh=mesh["ddp"], mp_policy=policy),
        )
        return model

    def whole(self, layout: Layout) -> Collection[StatePart]:
        """Everything."""
        return {"weights", "gradients", "optimizer"}

    def account(self, account: Account) -> None:
        """Add what units send."""
        account_replicated(account)
