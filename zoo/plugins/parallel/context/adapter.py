"""The `context` adapter: rows of tokens are cut over the axis `cp`, and the attention seam learns to exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo import (
    Batch,
    ContextScheme,
    Layout,
    Link,
    Mesh,
    ParallelAdapter,
    ParallelPlan,
    Phase,
    UsageError,
    replace_modules,
)
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, Question, ShardedMask
from zoo.core.contracts.account import COUNT_BYTES
from zoo.core.sequence.row_layout import row_layout

if TYPE_CHECKING:
    from zoo import Account, Mask


class ContextParallel(ParallelAdapter):
    """Context parallelism for any model with an `attention` seam, by any scheme, with any backend."""

    name = "context"
    axes = ("cp",)
    phase = Phase.EXCHANGE

    def __init__(self) -> None:
        self._asked: set[Question] = set()

    def check(self, layout: Layout) -> str | None:
        """None, or the reason why this row cannot be cut so."""
        degree = layout.degrees.cp
        if degree == 1:
            return None
        if not layout.schemes:
            return f"--cp {degree} needs a context scheme and none was chosen; type --cp-scheme ring"
        if layout.seq < degree:
            return f"--seq {layout.seq} cannot be shared out over --cp {degree} ranks"
        reasons = (
            scheme.check(problem, layout.seq, degree)
            for scheme in layout.schemes.values()
            for problem in layout.problems
        )
        return next((reason for reason in reasons if reason), None)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Give every attention seam its scheme and the group, and sum a row's counts over the group.

        Raises UsageError if the model has no attention seam.
        """
        if "attention" not in plan.seams:
            raise UsageError(f"--cp needs an attention seam and {type(model).__name__}'s plan names none; use --cp 1")
        group = mesh["cp"].get_group()
        _connect(group, mesh.device_type)
        link = Link(group, getattr(torch, layout.settings.cp_wire) if layout.settings.cp_wire else None)
        replace_modules(
            model, plan.seams["attention"], lambda old: _exchanging(old, _schemes(layout), link), owner=self.name
        )
        if "row_sum" in plan.seams:
            replace_modules(model, plan.seams["row_sum"], lambda old: _RowSum(old, group), owner=self.name)
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, layout: Layout) -> Batch:
        """This rank's tokens, labels and positions, and its view of the mask with all plans made. Host only."""
        rank = mesh["cp"].get_local_rank()
        sharded = _sharded(batch.mask, layout, mesh["cp"].size(), rank, self._asked)
        sharded.prepare()
        places = sharded.layout
        return replace(
            batch,
            tokens=places.take(batch.tokens, rank, 1),
            labels=places.take(batch.labels, rank, 1),
            positions=places.take(batch.positions, rank, 1),
            mask=sharded,
        )

    def account(self, account: Account) -> None:
        """Add what the schemes' plans send for each attention layer here, and counts of a row."""
        layout, degree = account.layout, account.size("tp")
        attending = account.found([account.plan.seams["attention"]])
        shapes = zip(account.spec.windows(account.config), account.spec.heads(account.config), strict=True)
        of_layer = dict(zip(attending, shapes, strict=True))
        layers = Counter(of_layer[name] for name in account.here(attending))
        value, gradient = _wire_bytes(layout.dtype, layout.settings.cp_wire)
        for batch in account.batches:
            sharded = _sharded(batch.mask, layout, account.size("cp"), account.rank("cp"), set())
            for (window, heads), number in layers.items():
                plan = sharded.plan(layout.schemes[window], window, heads.over(degree))
                ahead, back = (sum(stage.sent for stage in way) for way in plan.stages(value, gradient))
                account.add("send", "cp", "K/V or heads", number * (account.forwards * ahead + back))
            if account.is_last and "row_sum" in account.plan.seams and account.experts is not None:
                account.add("all_reduce", "cp", "counts of a row", account.experts.num_experts * COUNT_BYTES)


class _RowSum(nn.Module):
    """The row_sum seam over the ranks that share a row."""

    def __init__(self, inner: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def forward(self, counts: Tensor) -> Tensor:
        total: Tensor = self.inner(counts).clone()
        dist.all_reduce(total, group=self.group)
        return total


def _schemes(layout: Layout) -> Mapping[int | None, ContextScheme]:
    if not layout.schemes:
        raise UsageError("--cp needs a context scheme and none was chosen; type --cp-scheme ring")
    return layout.schemes


def _sharded(mask: Mask, layout: Layout, degree: int, rank: int, asked: set[Question]) -> ShardedMask:
    """A rank's view of a row."""
    places = row_layout(
        mask,
        layout.model.windows,
        degree,
        balance=layout.settings.cp_balance,
        splits_rows=any(scheme.splits_rows for scheme in _schemes(layout).values()),
    )
    return ShardedMask(mask, places, rank, asked)


def _wire_bytes(dtype: str, wire: str | None) -> tuple[int, int]:
    """Of one number of K/V and of a sum of their gradients, as `Link.carried` has them."""
    own = getattr(torch, dtype)
    both = own.itemsize, torch.promote_types(own, torch.float32).itemsize
    ahead, back = (size if wire is None else min(size, getattr(torch, wire).itemsize) for size in both)
    return ahead, back


def _exchanging(old: nn.Module, schemes: Mapping[int | None, ContextScheme], link: Link) -> AttentionSeam:
    if not isinstance(old, AttentionSeam):
        raise UsageError(
            f"--cp found {type(old).__name__} in the attention seam, where core puts an AttentionSeam: "
            f"another plugin replaced it; block that plugin with --no-plugin NAME"
        )
    return AttentionSeam(old.backend, Exchange(scheme=schemes[old.window], link=link), window=old.window)


def _connect(group: dist.ProcessGroup, device_type: str) -> None:
    """NCCL connects a group in its first call, in which all ranks must take part; a ring's hop may leave some out."""
    if device_type != "cpu":
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
