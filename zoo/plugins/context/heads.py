"""Which heads each rank of a group computes when heads are dealt out. Host only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from zoo import HeadShape
from zoo.core.sequence.ranges import Range


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Query heads of a rank, and the key/value heads they read; every one of these serves as many of them."""

    query: Range
    key_value: Range

    @property
    def shape(self) -> tuple[int, int]:
        """Number of query heads and of key/value heads."""
        return self.query[1] - self.query[0], self.key_value[1] - self.key_value[0]


def share_heads(heads: HeadShape, degree: int) -> tuple[HeadShare, ...]:
    """Deal heads out over so many ranks, as evenly as whole key/value heads allow.

    With fewer key/value heads than ranks each rank reads one, which its neighbours read too: only then are they
    replicated, and the query heads that share one are dealt out among its readers.
    """
    kv_heads, repeats = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads
    if kv_heads >= degree:
        edges = [kv_heads * rank // degree for rank in range(degree + 1)]
        return tuple(HeadShare((repeats * a, repeats * b), (a, b)) for a, b in pairwise(edges))
    shares = []
    for kv_head in range(kv_heads):
        readers = _readers(kv_head, kv_heads, degree)
        for number in range(readers):
            start, stop = (kv_head * repeats + repeats * i // readers for i in (number, number + 1))
            shares.append(HeadShare((start, stop), (kv_head, kv_head + 1)))
    return tuple(shares)


def sharing_problem(heads: HeadShape, degree: int) -> str | None:
    """None if every rank gets a query head, otherwise a sentence with the largest degree at which it does."""
    if _fits(heads, degree):
        return None
    most = next(n for n in range(degree, 0, -1) if _fits(heads, n))
    return (
        f"{heads.num_heads} query heads over {heads.num_kv_heads} key/value heads can be dealt out to at most {most} "
        f"ranks, not to {degree}"
    )


def _fits(heads: HeadShape, degree: int) -> bool:
    kv_heads = heads.num_kv_heads
    return kv_heads >= degree or max(_readers(i, kv_heads, degree) for i in range(kv_heads)) <= (
        heads.num_heads // kv_heads
    )


def _readers(kv_head: int, kv_heads: int, degree: int) -> int:
    return degree * (kv_head + 1) // kv_heads - degree * kv_head // kv_heads
