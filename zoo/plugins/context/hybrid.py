"""The `hybrid` scheme: heads are dealt out within groups of neighbours, K/V of the groups' rows go round a ring.

DeepSpeed-Ulysses (2309.14509) inside, ring attention across, as USP (2405.07719). Any factorisation U x R of the
degree works: U = P is `ulysses`, U = 1 is `ring`. Shape letters: B rows, T tokens of this rank, S tokens of its group,
N query heads, G key/value heads, n and g those of this rank, H head size.
"""

from __future__ import annotations

from torch import Tensor

from zoo import AttentionBackend, AttentionProblem, HeadShape, Link, Mask, SequenceLayout, UsageError
from zoo.plugins.context.head_exchange import gather_rows, scatter_rows
from zoo.plugins.context.heads import sharing_problem
from zoo.plugins.context.hybrid_plan import HybridPlan, hybrid_plan
from zoo.plugins.context.ring import Ring


class Hybrid:
    """`hybrid` takes the proper factor with the least traffic, `hybrid:4` groups of 4 ranks."""

    name = "hybrid"
    splits_rows = True

    def __init__(self, group: str | int | None = None) -> None:
        """Raises UsageError if the group is no size."""
        if group is not None and not str(group).isdecimal():
            raise UsageError(f"--cp-scheme hybrid:{group}: after the colon comes the size of a group, as hybrid:4")
        self._group = None if group is None else int(group)
        self._ring = Ring()
        if self._group is not None:
            self.name = f"hybrid:{self._group}"

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None, or why heads or ranks cannot be dealt out so, with what can."""
        if self._group is None:
            return None
        if not self._group or degree % self._group:
            sizes = [n for n in range(1, degree + 1) if degree % n == 0]
            return f"groups of {degree} ranks have {', '.join(map(str, sizes[:-1]))} or {sizes[-1]}, not {self._group}"
        reason = sharing_problem(problem.heads, self._group)
        return reason and f"{reason}; name a smaller group, or type --cp-scheme ring"

    def inner(self, heads: HeadShape, degree: int) -> int:
        """Ranks of a group."""
        return self._group or best_group(heads, degree)

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape) -> HybridPlan:
        return hybrid_plan(mask, layout, rank, heads, inner=self.inner(heads, layout.degree))

    def forward(
        self, backend: AttentionBackend, plan: HybridPlan, link: Link, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        ranges = [[share.query, share.key_value, share.key_value] for share in plan.shares]
        q, k, v = gather_rows(plan, link, (q, k, v), ranges)
        out, saved = self._ring.forward(backend, plan.ring, link, q, k, v, scale)
        mine = scatter_rows(plan, link, [out], [[share.query] for share in plan.shares], [plan.heads.num_heads])
        return mine[0], saved

    def backward(
        self,
        backend: AttentionBackend,
        plan: HybridPlan,
        link: Link,
        dout: Tensor,
        saved: tuple[Tensor, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (dout_full,) = gather_rows(plan, link, (dout,), [[share.query] for share in plan.shares])
        dq, dk, dv = self._ring.backward(backend, plan.ring, link, dout_full, saved, scale)
        heads, kv = plan.heads, [share.key_value for share in plan.shares]
        # A gradient that is complete travels in the type it will have; parts of one, which are added up, in fp32.
        if len(plan.shares) <= heads.num_kv_heads:
            dk, dv = dk.to(dout.dtype), dv.to(dout.dtype)
        queries = scatter_rows(
            plan, link, [dq.to(dout.dtype)], [[share.query] for share in plan.shares], [heads.num_heads]
        )
        keys = scatter_rows(
            plan, link, [dk, dv], [[part, part] for part in kv], [heads.num_kv_heads, heads.num_kv_heads]
        )
        return queries[0], keys[0], keys[1]


def best_group(heads: HeadShape, degree: int) -> int:
    """The size of a group that sends least forward, of those that mix both if there is one.

    Heads cost (2N + 2G') (U - 1) / U shares of a row, the ring 2 (R - 1) G' with G' = max(G, U) key/value heads.
    """
    sizes = [n for n in range(1, degree + 1) if degree % n == 0 and sharing_problem(heads, n) is None]
    mixed = [n for n in sizes if 1 < n < degree] or sizes

    def rows(group: int) -> float:
        kv_heads = max(heads.num_kv_heads, group)
        dealt = 2 * (heads.num_heads + kv_heads) * (group - 1) / group
        return dealt + 2 * (degree // group - 1) * kv_heads

    return min(mixed, key=lambda group: (rows(group), group))
