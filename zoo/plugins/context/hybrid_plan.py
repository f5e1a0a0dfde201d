"""The plan of schemes that deal heads out within small groups of ranks, with a ring across the groups. Host only.

Rank r of P = U * R is number r % U of group r // U: the ranks of a group are neighbours, where links are fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from zoo import HeadShape, Mask, SequenceLayout, Stage
from zoo.core.attention.slices import Slices
from zoo.core.sequence.ranges import Ranges, RowIndex, count, union
from zoo.plugins.context.heads import HeadShare, share_heads
from zoo.plugins.context.ring_plan import RingPlan, ring_plan


@dataclass(frozen=True, slots=True)
class HybridPlan:
    """What one rank does for one batch, in every layer of one shape."""

    heads: HeadShape
    peers: tuple[int, ...]
    """Ranks of this rank's group, itself included."""
    me: int
    """This rank's number in it."""
    shares: tuple[HeadShare, ...]
    """Heads of each of them."""
    places: tuple[Ranges, ...]
    """Where the rows of each lie among the group's rows, chunk by chunk."""
    rows: int
    """The group's rows."""
    ring: RingPlan
    """What happens across groups, with the group's rows and this rank's heads."""

    @property
    def slices(self) -> Slices:
        """Every slice, relative to its step."""
        return self.ring.slices

    @property
    def local(self) -> int:
        """Rows of this rank."""
        return count(self.places[self.me])

    def stages(self, value_bytes: int, gradient_bytes: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Heads gathered, the ring, results given back; nothing hides the first and the last."""
        ring = self.ring.stages(value_bytes, gradient_bytes)
        size, mine = self.heads.head_dim, self.shares[self.me]
        others = [share for number, share in enumerate(self.shares) if number != self.me]
        queries, keys = (sum(share.shape[i] for share in others) for i in (0, 1))
        elsewhere = self.rows - self.local
        inward = size * self.local
        outward = size * elsewhere
        replicated = len(self.shares) > self.heads.num_kv_heads
        sums = gradient_bytes if replicated else value_bytes
        ahead = (
            Stage(value_bytes * inward * (queries + 2 * keys), 0),
            *ring[0],
            Stage(value_bytes * outward * mine.shape[0], 0),
        )
        back = (
            Stage(value_bytes * inward * queries, 0),
            *ring[1],
            Stage(outward * (value_bytes * mine.shape[0] + sums * 2 * mine.shape[1]), 0),
        )
        return ahead, back


def hybrid_plan(mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape, *, inner: int) -> HybridPlan:
    """The plan of one rank of groups of `inner` ranks each; `inner` divides the degree."""
    group, me = divmod(rank, inner)
    groups = range(layout.degree // inner)
    merged = SequenceLayout(
        layout.length,
        tuple(union(part for r in range(g * inner, (g + 1) * inner) for part in layout.chunks[r]) for g in groups),
    )
    peers = tuple(range(group * inner, (group + 1) * inner))
    index = RowIndex(merged.chunks[group])
    shares = share_heads(heads, inner)
    mine = replace(heads, num_heads=shares[me].shape[0], num_kv_heads=shares[me].shape[1])
    return HybridPlan(
        heads=heads,
        peers=peers,
        me=me,
        shares=shares,
        # A chunk is one run of its group's rows, for nobody else owns a row inside it.
        places=tuple(
            tuple((index.before(start), index.before(start) + stop - start) for start, stop in layout.chunks[peer])
            for peer in peers
        ),
        rows=index.total,
        ring=ring_plan(mask, merged, group, mine, peers=[g * inner + me for g in groups]),
    )
