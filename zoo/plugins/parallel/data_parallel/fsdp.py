"""FSDP2 on the plan's blocks: each rank keeps 1/(dp_shard x cp) of weights, gradients and optimizer state.

With dp_replicate there are so many copies of that, whose gradients are added up once a step (HSDP). Experts are units
of their own inside their block: dealt out over `ep`, they are sharded over what is left, `efsdp`.
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


class FullyShardedData(units.DataParallel):
    """`fully_shard` of every block and of the root, summing gradients."""

    name: ClassVar[str] = "fsdp"

    def check(self, layout: Layout) -> str | None:
        """None, or why experts cannot be cut so."""
        return units.sharding_objection(layout)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Shard in place."""
        units.shard(model, plan, mesh, layout, reshard=layout.settings.reshard)
        return model

    def whole(self, layout: Layout) -> Collection[StatePart]:
        """Weights too are cut, unless they are kept from forward to backward."""
        return set() if layout.settings.reshard else {"weights"}

    def begin_microbatch(self, model: nn.Module, *, last: bool) -> None:
        """Shards of gradients add up on their rank; copies meet once a step."""
        units.root(model).set_requires_all_reduce(last)

    def account(self, account: Account) -> None:
        """Add what units send."""
        account_sharded(account, reshard=account.layout.settings.reshard, once=False)
