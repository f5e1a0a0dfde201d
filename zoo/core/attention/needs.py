"""Which rows of a rank's K and V other ranks must see: what every context scheme sends, and all it may send."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask
from zoo.core.attention.ranges import Range, Ranges, union


@dataclass(frozen=True, slots=True)
class Need:
    """Positions `rows`, owned by `owner`, are seen by queries of `ranks` (never the owner itself)."""

    owner: int
    rows: Range
    ranks: frozenset[int]


def remote_needs(mask: Mask, layout: SequenceLayout) -> tuple[Need, ...]:
    """Everything that must travel, over all ranks.

    A document leaves a chunk only over its edges, so a chunk has at most two needs: its rows of the document that
    runs on into later chunks, and, if the mask is not causal, of the one that began in earlier chunks.
    """
    chunks = layout.owners()
    starts, ranks = [chunk[0] for chunk in chunks], [chunk[2] for chunk in chunks]
    needs = []
    for start, stop, owner in chunks:
        for rows, seen in _crossings(mask, start, stop):
            first = bisect_right(starts, seen[0]) - 1
            readers = frozenset(ranks[first : bisect_left(starts, seen[1])]) - {owner}
            if readers:
                needs.append(Need(owner, rows, readers))
    return tuple(needs)


def rows_needed(needs: tuple[Need, ...], owner: int, rank: int) -> Ranges:
    """Positions of `owner` that queries of `rank` see."""
    return union(need.rows for need in needs if need.owner == owner and rank in need.ranks)


def _crossings(mask: Mask, start: int, stop: int) -> Iterator[tuple[Range, Range]]:
    """Key positions of a chunk that are seen from outside it, each with the query positions that see them."""
    after = mask.document_at(stop - 1)
    if after and after[1] > stop:
        yield (max(start, after[0]), stop), (stop, after[1])
    before = mask.document_at(start)
    if before and before[0] < start and not mask.causal:
        yield (start, min(stop, before[1])), (before[0], start)
