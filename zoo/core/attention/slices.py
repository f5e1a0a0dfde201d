"""From a mask and two sets of rows to the rectangles of scores that must be computed, and no others.

Chunks partition the row, so a piece of a document on the query side and one on the key side are either identical or
disjoint. Without a window that leaves triangles (identical) and rectangles. A window W cuts what is seen from below as
well: the pairs it lets through form a band along the diagonal, which is an exact union of causal triangles,
rectangles, and anti-causal triangles at the band's lower edge.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from zoo.core.contracts.attention import AttentionSlice, SliceRule
from zoo.core.sequence.mask import Document, Mask
from zoo.core.sequence.ranges import Range, Ranges, RowIndex

Slices = tuple[AttentionSlice, ...]

_FULL, _CAUSAL, _ANTICAUSAL = SliceRule.FULL, SliceRule.CAUSAL, SliceRule.ANTICAUSAL
_Piece = tuple[int, int, int, int, SliceRule]
"""Positions of queries `[a, b)` and keys `[c, d)`, and the rule between them."""


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

    @property
    def area(self) -> int:
        """Number of scores computed."""
        return sum(s.area for s in self.slices)


def local_slices(mask: Mask, chunks: Ranges) -> Slices:
    """Slices of a rank's own queries and its own keys, both the rows of `chunks`."""
    rows = RowIndex(chunks)
    if mask.window is not None:
        return _placed(_windowed(mask, mask.window, chunks, chunks), rows, rows)
    # What a rank holds of a document is one run of its rows in order of position, so each document is one triangle
    # (and a rectangle for the prefix that everybody sees).
    found = {document.start: document for chunk in chunks for document in mask.documents_in(*chunk)}
    slices: list[AttentionSlice] = []
    for document in found.values():
        start, stop = rows.before(document.start), rows.before(document.stop)
        prefix = rows.before(document.prefix_stop)
        if start < prefix:
            slices.append(AttentionSlice(start, stop, start, prefix, _FULL))
        if prefix < stop:
            slices.append(AttentionSlice(prefix, stop, prefix, stop, _CAUSAL))
    return tuple(slices)


def remote_slices(mask: Mask, queries: Ranges, keys: Ranges) -> Slices:
    """Slices of a rank's queries (its chunks) and keys of other ranks (any rows but its own), in local rows.

    Only the documents at the edges of a chunk reach beyond it, so the cost does not grow with their number.
    """
    rows, index = RowIndex(queries), RowIndex(keys)
    if mask.window is not None:
        return _placed(_windowed(mask, mask.window, queries, keys), rows, index)
    return _placed(_edges(mask, queries), rows, index)


def _placed(pieces: Iterator[_Piece], rows: RowIndex, index: RowIndex) -> Slices:
    """Positions as rows of the tensors that hold them."""
    slices: list[AttentionSlice] = []
    for start, stop, first, last, rule in pieces:
        found = AttentionSlice(rows.before(start), rows.before(stop), index.before(first), index.before(last), rule)
        if found.q_start < found.q_stop and found.k_start < found.k_stop:
            _append(slices, found)
    return tuple(slices)


def _edges(mask: Mask, queries: Ranges) -> Iterator[_Piece]:
    """What the documents that leave a chunk see outside it: keys before the chunk, and the prefix wherever it lies."""
    for start, stop in queries:
        ends = (mask.document_at(start), mask.document_at(stop - 1))
        for document in dict.fromkeys(ends):
            if document is not None:
                first = max(start, document.start)
                yield first, min(stop, document.stop), document.start, max(first, document.prefix_stop), _FULL


def _windowed(mask: Mask, window: int, queries: Ranges, keys: Ranges) -> Iterator[_Piece]:
    """What each piece of a document sees of the runs of keys: of the one it lies in itself, and of earlier ones."""
    starts = list(map(itemgetter(0), keys))
    for chunk in queries:
        for document in _reaching(mask, chunk, inside=keys is queries):
            start, stop = max(chunk[0], document.start), min(chunk[1], document.stop)
            reach = max(document.start, start - window + 1)
            for first, last in keys[max(0, bisect_right(starts, reach) - 1) :]:
                if first >= stop:
                    break
                if first == chunk[0]:
                    yield from _diagonal_band(start, stop, window)
                elif max(first, reach) < last:
                    yield from _lower_band(start, stop, max(first, reach), last, window)


def _reaching(mask: Mask, chunk: Range, *, inside: bool) -> list[Document]:
    """Documents of a chunk that see keys outside it, or all of them."""
    if inside:
        return mask.documents_in(*chunk)
    head = mask.document_at(chunk[0])
    return [head] if head is not None and head.start < chunk[0] else []


def _diagonal_band(start: int, stop: int, window: int) -> Iterator[_Piece]:
    """Rows `[start, stop)` and themselves as keys: a causal triangle each `window` rows, and the band below it."""
    for first in range(start, stop, window):
        last = min(first + window, stop)
        yield first, last, first, last, _CAUSAL
        if first > start:
            yield from _lower_band(first, last, first - window, first, window)


def _lower_band(start: int, stop: int, first: int, last: int, window: int) -> Iterator[_Piece]:
    """Rows `[start, stop)` and earlier keys `[first, last)`, of which row i sees those from i - window + 1 on."""
    whole = min(stop, first + window)
    if start < whole:
        yield start, whole, first, last, _FULL
    a, b = max(start, whole), min(stop, last + window - 1)
    if a < b:
        low, high = a - window + 1, b - window + 1
        yield a, b, low, high, _ANTICAUSAL
        yield a, b, high, last, _FULL


def _append(slices: list[AttentionSlice], new: AttentionSlice) -> None:
    """Append a slice, as part of the last one if its queries follow on and see the same keys."""
    last = slices[-1] if slices else None
    same = last and last.q_stop == new.q_start and (last.k_start, last.k_stop) == (new.k_start, new.k_stop)
    if last and same and last.rule is new.rule is _FULL:
        slices[-1] = last._replace(q_stop=new.q_stop)
    else:
        slices.append(new)
