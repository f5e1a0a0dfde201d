"""Which rows of a rank's K and V other ranks must see: what every context scheme sends, and all it may send."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import Range, Ranges, union


@dataclass(frozen=True, slots=True)
class Need:
    """Positions `rows`, owned by `owner`, are seen by queries of `ranks` (never the owner itself)."""

    owner: int
    rows: Range
    ranks: frozenset[int]


def remote_needs(mask: Mask, layout: SequenceLayout) -> tuple[Need, ...]:
    """Everything that must travel, over all ranks.

    A document leaves a chunk only over its edges: a chunk's rows of the document that runs on into later chunks are
    seen there, as far back as a window reaches, and rows of a prefix are seen in earlier chunks too.
    """
    chunks = layout.owners()
    starts, ranks = [chunk[0] for chunk in chunks], [chunk[2] for chunk in chunks]
    needs: list[Need] = []
    for start, stop, owner in chunks:
        for rows, seen in _crossings(mask, start, stop):
            first = bisect_right(starts, seen[0]) - 1
            readers = range(first, bisect_left(starts, seen[1]))
            if mask.window is None:
                groups = {rows: {ranks[i] for i in readers}}
            else:
                groups = _within(mask.window, rows, [(starts[i], ranks[i]) for i in readers])
            needs += [Need(owner, part, frozenset(who - {owner})) for part, who in groups.items() if who - {owner}]
    return tuple(needs)


def rows_needed(needs: tuple[Need, ...], owner: int, rank: int) -> Ranges:
    """Positions of `owner` that queries of `rank` see."""
    return union(need.rows for need in needs if need.owner == owner and rank in need.ranks)


def _crossings(mask: Mask, start: int, stop: int) -> Iterator[tuple[Range, Range]]:
    """Key positions of a chunk that are seen from outside it, each with the query positions that see them."""
    after = mask.document_at(stop - 1)
    if after and after.stop > stop:
        last = after.stop if mask.window is None else min(after.stop, stop + mask.window - 1)
        if stop < last:
            yield (max(start, after.start), stop), (stop, last)
    before = mask.document_at(start)
    if before and before.start < start < before.prefix_stop:
        yield (start, min(stop, before.prefix_stop)), (before.start, start)


def _within(window: int, rows: Range, readers: list[tuple[int, int]]) -> dict[Range, set[int]]:
    """The last of the rows that a later chunk's first query still sees, by the chunks `(start, rank)` that see them.

    A rank's nearest chunk sees the most; what its further ones see is part of that.
    """
    groups: dict[Range, set[int]] = {}
    done: set[int] = set()
    for start, rank in readers:
        if rank not in done:
            done.add(rank)
            groups.setdefault((max(rows[0], start - window + 1), rows[1]), set()).add(rank)
    return groups
