"""From a mask and two sets of rows to the rectangles of scores that must be computed, and no others.

Chunks partition the row, so a piece of a document on the query side and one on the key side are either identical
(causal) or disjoint (full or empty). No other rule is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from zoo.core.attention.mask import Mask
from zoo.core.attention.ranges import Range, Ranges, RowIndex
from zoo.core.contracts import AttentionSlice, SliceRule

Slices = tuple[AttentionSlice, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Slices, relative to the smallest ranges of query and key rows that hold them all."""

    queries: Range
    keys: Range
    slices: Slices

    @classmethod
    def around(cls, slices: Sequence[AttentionSlice]) -> Step:
        """Shift slices of local rows to their bounding box."""
        if not slices:
            return cls((0, 0), (0, 0), ())
        q, k = min(s.q_start for s in slices), min(s.k_start for s in slices)
        return cls(
            (q, max(s.q_stop for s in slices)),
            (k, max(s.k_stop for s in slices)),
            tuple(AttentionSlice(s.q_start - q, s.q_stop - q, s.k_start - k, s.k_stop - k, s.rule) for s in slices),
        )


def local_slices(mask: Mask, chunks: Ranges) -> Slices:
    """Slices of a rank's own queries and its own keys, both the rows of `chunks`.

    What a rank holds of a document is one run of its rows in order of position, so each document is one slice.
    """
    rows, rule = RowIndex(chunks), SliceRule.CAUSAL if mask.causal else SliceRule.FULL
    found = dict.fromkeys(document for chunk in chunks for document in mask.documents_in(*chunk))
    spans = [(rows.before(start), rows.before(stop)) for start, stop in found]
    return tuple(AttentionSlice(start, stop, start, stop, rule) for start, stop in spans)


def remote_slices(mask: Mask, queries: Ranges, keys: Ranges) -> Slices:
    """Slices of a rank's queries (its chunks) and keys of other ranks (any rows but its own), in local rows.

    Only the documents at the edges of a chunk reach beyond it, so the cost does not grow with their number.
    """
    rows, index = RowIndex(queries), RowIndex(keys)
    slices: list[AttentionSlice] = []
    for start, stop, k_first, k_last in _edges(mask, queries):
        found = AttentionSlice(
            rows.before(start), rows.before(stop), index.before(k_first), index.before(k_last), SliceRule.FULL
        )
        if found.k_start < found.k_stop:
            _append(slices, found)
    return tuple(slices)


def _edges(mask: Mask, queries: Ranges) -> Iterator[tuple[int, int, int, int]]:
    """Query pieces of documents that leave their chunk, each with the positions `[first, last)` it may see."""
    for start, stop in queries:
        head = mask.document_at(start)
        if head and (head[0] < start or (head[1] > stop and not mask.causal)):
            yield start, min(stop, head[1]), head[0], start if mask.causal else head[1]
        tail = mask.document_at(stop - 1)
        if tail and tail != head and tail[1] > stop and not mask.causal:
            yield tail[0], stop, tail[0], tail[1]


def _append(slices: list[AttentionSlice], new: AttentionSlice) -> None:
    """Append a slice, as part of the last one if its queries follow on and see the same keys."""
    last = slices[-1] if slices else None
    if last and last.q_stop == new.q_start and (last.k_start, last.k_stop) == (new.k_start, new.k_stop):
        slices[-1] = replace(last, q_stop=new.q_stop)
    else:
        slices.append(new)
