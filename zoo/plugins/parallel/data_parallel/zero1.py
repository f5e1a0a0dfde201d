"""The distributed optimizer (ZeRO-1): weights and gradients are whole during a step, optimizer state is sharded.

What is sharded is what the optimizer works on: master weights and moments. A step gathers each weight once, in its
first forward, keeps it through all microbatches, adds gradients up on the rank and reduce-scatters each once, in its
last backward. Traffic does not grow with the number of microbatches, nor with recompute. FSDP2 does all of it when told
when to gather and when to reduce, so state has the same shards, and the same checkpoint, as under `fsdp`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from zoo import Layout, ParallelPlan, StatePart
from zoo.plugins.parallel.data_parallel import units
from zoo.plugins.parallel.data_parallel.traffic import account_sharded

if TYPE_CHECKING:
    from zoo import Account, Mesh


class ShardedOptimizer(units.DataParallelOnceAStep):
    """Optimizer state over dp_shard x cp; weights and gradients whole from the first forward to the last backward."""

    name: ClassVar[str] = "zero1"

    def check(self, layout: Layout) -> str | None:
        """None, or why experts cannot be cut so, or weights not be kept."""
        return units.keeping_objection(layout, self.name) or units.sharding_objection(layout)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Shard in place what the optimizer sees."""
        units.shard(model, plan, mesh, layout, reshard=False)
        return model

    def whole(self, layout: Layout) -> Collection[StatePart]:
        """Weights, and gradients where they add up over microbatches."""
        return {"weights", "gradients"} if layout.microbatches > 1 else {"weights"}

    def account(self, account: Account) -> None:
        """Add what units send: once a step."""
        account_sharded(account, reshard=False, once=True)
