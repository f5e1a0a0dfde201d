"""Sets of row numbers as ascending, disjoint `(start, stop)` ranges: the arithmetic of who owns and who needs what."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def union(ranges: Iterable[Range]) -> Ranges:
    """The fewest ranges that cover the same rows. Empty ranges vanish."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def count(ranges: Iterable[Range]) -> int:
    """Number of rows."""
    return sum(stop - start for start, stop in ranges)


def complement(ranges: Ranges, length: int) -> Ranges:
    """The rows of `[0, length)` that ascending, disjoint ranges leave out."""
    edges = [0, *(edge for part in ranges for edge in part), length]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


class RowIndex:
    """Finds rows in a tensor that holds the rows of some ranges one after another."""

    __slots__ = ("_offsets", "_starts", "_stops", "total")

    def __init__(self, ranges: Ranges) -> None:
        self._starts = [start for start, _ in ranges]
        self._stops = [stop for _, stop in ranges]
        self._offsets = [0]
        for start, stop in ranges:
            self._offsets.append(self._offsets[-1] + stop - start)
        self.total = self._offsets.pop() if ranges else 0

    def before(self, position: int) -> int:
        """How many of the rows come before a position: its row in the tensor, if it is there."""
        i = bisect_right(self._starts, position) - 1
        return 0 if i < 0 else self._offsets[i] + min(position, self._stops[i]) - self._starts[i]

    def locate(self, ranges: Ranges) -> Ranges:
        """Rows of the tensor that hold these positions, in the fewest ranges."""
        return union((self.before(start), self.before(stop)) for start, stop in ranges)


def share_of(length: int, rank: int, size: int) -> int:
    """Return how many rows of `length` a rank has where `size` ranks share them evenly, the last one what is left."""
    each = -(-length // size)
    return max(0, min(each, length - rank * each))
