"""The layout that gives every rank of a packed row the same number of tokens and the same attention area.

Necklace splitting: lay the row on a circle, find for the next rank a window of consecutive tokens whose area is right,
take it out, close the circle, go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import Ranges, union

Ints: TypeAlias = NDArray[np.int64]
Layers: TypeAlias = tuple[tuple[int | None, int], ...]
"""Pairs of a window and the number of layers that have it."""

_row_of = attrgetter("length", "causal", "documents", "prefixes")

SLACK = 0.03
"""By what part of the mean a rank may do more than the mean, if its cuts cost fewer K/V rows than it has itself."""
RIGHT = 1e-4
"""By what part of its share a window's area may be off and count as right."""
SAMPLES = 4096
"""Places that are looked at together where all of them would be too many."""


def balanced(work: Sequence[tuple[Mask, int]], degree: int) -> SequenceLayout:
    """A layout with equal tokens and equal attention area on every rank, few cuts and little K/V traffic.

    `work` holds the masks of one row as its layers see it, each with its number of layers; they differ in `window`
    only. Ranks get floor or ceil of length/degree tokens. Each rank's area, summed over layers, is at most 1 + SLACK
    times its tokens' share plus the areas of a few tokens, and it has about two chunks. A pure function of its
    arguments, on the host: all ranks come to the same layout. Raises UsageError if there is no rank or no mask, or if
    the masks are not of one row.

    Windows of the right area always exist: over all places on a circle the mean area of windows of n tokens is n times
    the mean area of a token, and from one place to the next it changes by at most one token's area (Goldberg and West,
    Bisection of circle colorings, 1985). One causal document comes out as the head-tail layout, short documents or
    short windows as nearly contiguous parts.
    """
    if degree < 1:
        raise UsageError(f"a layout needs at least one rank, not {degree}")
    row = _Row.of(work)
    circle = _Circle.of(row, ((0, row.length),) if row.length else ())
    parts = []
    for ranks in range(degree, 0, -1):
        size = (2 * circle.length + ranks) // (2 * ranks)
        taken, rest = circle.cut(_place(circle, size) if ranks > 1 and size else 0, size)
        parts.append(union(taken))
        circle = _Circle.of(row, rest)
    behind = ((row.length, row.length),)
    return SequenceLayout(row.length, tuple(sorted(parts, key=lambda part: part or behind)))


def _place(circle: _Circle, size: int) -> int:
    """Where on the circle the next rank's window of `size` tokens starts.

    Windows at the last gap come first: they leave fewer pieces, and pair what is left of a long document with the
    short ones behind it, whose tokens cost least.
    """
    for near in (True, False):
        found = _cheapest(circle, circle.places(size, near=near), size)
        if found is not None:
            return found % circle.length
    samples = np.linspace(0, circle.length - 1, min(circle.length, SAMPLES)).astype(np.int64)
    return int(samples[np.abs(circle.areas(samples, size) - circle.share(size)).argmin()])


def _cheapest(circle: _Circle, places: Ints, size: int) -> int | None:
    """Of the windows with an acceptable area that start at ascending places, or between two of them, the cheapest."""
    areas, share = circle.areas(places, size), circle.share(size)
    fitting = _fitting(circle, places, areas, size)
    below = areas <= share
    (crossings,) = np.nonzero(below[:-1] != below[1:])
    starts, steps = places[crossings], places[crossings + 1] - places[crossings]
    rises = (share - areas[crossings]) / (areas[crossings + 1] - areas[crossings])
    choice = np.concatenate([fitting, starts + (rises * steps).astype(np.int64)])
    if not choice.size:
        return None
    best = int(circle.cut_rows(choice, size).argmin())
    if best < fitting.size:
        return int(fitting[best])
    crossing = crossings[best - fitting.size]
    return _exact(circle, size, int(places[crossing]), int(places[crossing + 1]))


def _fitting(circle: _Circle, places: Ints, areas: Ints, size: int) -> Ints:
    """The places whose windows have the right area, or an acceptable one and cuts that are worth it."""
    least, most = circle.acceptable(size)
    inside = (least <= areas) & (areas <= most)
    right = np.abs(areas[inside] - circle.share(size)) <= RIGHT * circle.share(size)
    found = places[inside]
    worth: Ints = found[right | (circle.cut_rows(found, size) <= size * circle.row.num_layers)]
    return worth


def _exact(circle: _Circle, size: int, first: int, last: int) -> int:
    """The place next to which areas cross a rank's share, given two places on either side of it.

    Where the area is linear the first guess is right; otherwise the middle halves what is left.
    """
    excess = circle.areas(np.array((first, last)), size) - circle.share(size)
    while last - first > 1:
        guess = first + int(excess[0] / (excess[0] - excess[-1]) * (last - first))
        around = {max(guess - 1, first), guess, min(guess + 1, last)}
        places = np.array(sorted({first, *around, (first + last) // 2, last}))
        excess = circle.areas(places, size) - circle.share(size)
        below = excess <= 0
        step = int((below[:-1] != below[1:]).argmax())
        first, last = places[step : step + 2].tolist()
        excess = excess[step : step + 2]
    return first if abs(excess[0]) <= abs(excess[-1]) else last


@dataclass(frozen=True, slots=True)
class _Row:
    """Areas and K/V rows at any positions of a row, summed over layers; one entry a document in each array."""

    length: int
    starts: Ints
    sizes: Ints
    prefixes: Ints
    layers: Layers
    before: Ints
    """Area of all documents before this one; a last entry for all."""
    marks: Ints
    """Positions where the area of a token jumps or changes its slope, ascending."""

    @classmethod
    def of(cls, work: Sequence[tuple[Mask, int]]) -> _Row:
        mask, layers = _one_row(work)
        documents = np.fromiter(chain.from_iterable(mask.documents), np.int64, 2 * len(mask.documents)).reshape(-1, 2)
        starts, sizes = documents[:, 0], documents[:, 1] - documents[:, 0]
        prefixes = np.asarray(mask.prefixes, np.int64) if mask.prefixes else np.zeros_like(sizes)
        prefixes = prefixes if mask.causal else sizes
        before = np.append(0, visible_before_each(sizes, prefixes, layers).cumsum())
        bends = [starts + np.minimum(sizes, window) for window, _ in layers if window is not None]
        marks = np.unique(np.concatenate([documents.ravel(), starts + prefixes, *bends]))
        return cls(mask.length, starts, sizes, prefixes, layers, before, marks)

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    def area_before(self, positions: Ints) -> Ints:
        """Area of all queries before each position."""
        if not self.starts.size:
            return np.zeros_like(positions)
        document, offsets = self._locate(positions)
        area: Ints = self.before[document] + visible_before_each(offsets, self.prefixes[document], self.layers)
        return area

    def cut_rows(self, positions: Ints) -> Ints:
        """About how many K/V rows must travel if the row is cut at each position: none between documents."""
        if not self.starts.size:
            return np.zeros_like(positions)
        document, offsets = self._locate(positions)
        whole = np.maximum(offsets, self.prefixes[document])
        rows = np.zeros_like(positions)
        for window, count in self.layers:
            rows += count * (whole if window is None else np.minimum(offsets, window - 1))
        return np.where((offsets == 0) | (offsets == self.sizes[document]), 0, rows)

    def _locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """The last document that starts at or before each position, and how many of its tokens come before it."""
        document = np.maximum(self.starts.searchsorted(positions, "right") - 1, 0)
        inside = np.maximum(positions - self.starts[document], 0)
        return document, np.minimum(inside, self.sizes[document])


@dataclass(frozen=True, slots=True)
class _Circle:
    """What is left of the row, closed to a circle that starts behind the last gap. A place is a distance from there."""

    row: _Row
    stretches: Ranges
    """Ranges of the row in the circle's order."""
    edges: Ints
    """The places between which stretches lie, from 0 to the length."""
    shifts: Ints
    """What to add to a position of a stretch for its place."""
    lifts: Ints
    """What to add to the row's area before a position of a stretch for the circle's."""
    length: int
    area: int

    @classmethod
    def of(cls, row: _Row, stretches: Ranges) -> _Circle:
        table = np.array(stretches, np.int64).reshape(-1, 2)
        areas = row.area_before(table.ravel()).reshape(-1, 2)
        edges = np.append(0, (table[:, 1] - table[:, 0]).cumsum())
        before = np.append(0, (areas[:, 1] - areas[:, 0]).cumsum())
        shifts, lifts = edges[:-1] - table[:, 0], before[:-1] - areas[:, 0]
        return cls(row, stretches, edges, shifts, lifts, int(edges[-1]), int(before[-1]))

    def share(self, size: int) -> float:
        """Area of `size` tokens if all did the mean of what is left."""
        return self.area * size / self.length

    def acceptable(self, size: int) -> tuple[float, float]:
        """Least and most area of the next window. What is left may exceed the mean as far as the row is dealt out."""
        mean = float(self.row.before[-1]) / self.row.length
        rest = self.length - size
        dealt = 1 - rest / self.row.length
        return self.area - (1 + SLACK * dealt) * mean * rest, (1 + SLACK) * mean * size

    def places(self, size: int, *, near: bool) -> Ints:
        """Where windows start or stop at a mark, ascending, from a place to the same place or the gap's other side.

        Windows near the last gap lie beside it or over it. Between two of the places the area is a polynomial.
        """
        first, last = (self.length - size, size) if near else (0, self.length)
        stops = self._marks(0, last) - size
        stops += self.length * (stops <= 0)
        return np.sort(np.concatenate([(first, self.length), self._marks(first, self.length), stops]))

    def areas(self, places: Ints, size: int) -> Ints:
        """Areas of the windows that start at places."""
        stops = places + size
        over = stops > self.length
        both = np.concatenate([places, stops - self.length * over])
        stretch = self.edges[1:-1].searchsorted(both, "right")
        before = self.row.area_before(both - self.shifts[stretch]) + self.lifts[stretch]
        areas: Ints = before[len(places) :] - before[: len(places)] + self.area * over
        return areas

    def cut_rows(self, places: Ints, size: int) -> Ints:
        """K/V rows that the two cuts of each window cost. A cut that is there already costs nothing."""
        both = np.concatenate([places, places + size])
        both -= self.length * (both >= self.length)
        stretch = self.edges[1:-1].searchsorted(both, "right")
        rows = np.where(self.edges[stretch] == both, 0, self.row.cut_rows(both - self.shifts[stretch]))
        return rows[: len(places)] + rows[len(places) :]

    def cut(self, place: int, size: int) -> tuple[Ranges, Ranges]:
        """Ranges of the row in a window, and those of the rest, from behind the window on."""
        stop = place + size
        over = max(0, stop - self.length)
        rest = self._between(stop, self.length) + self._between(over, place)
        return self._between(0, over) + self._between(place, stop), rest

    def _between(self, first: int, last: int) -> Ranges:
        return tuple((start, stop) for start, stop, _ in self._overlaps(first, last))

    def _marks(self, first: int, last: int) -> Ints:
        """Places `[first, last]` of the row's marks and of cuts already made."""
        found = [self.edges[(first <= self.edges) & (self.edges <= last)]]
        for start, stop, shift in self._overlaps(first, last):
            i, j = self.row.marks.searchsorted((start, stop))
            found.append(self.row.marks[i:j] + shift)
        return np.concatenate(found)

    def _overlaps(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Ranges of the row between two places, each with its shift."""
        for (start, stop), shift in zip(self.stretches, self.shifts.tolist(), strict=True):
            low, high = max(start, first - shift), min(stop, last - shift)
            if low < high:
                yield low, high, shift


def visible_before_each(offsets: Ints, prefixes: Ints, layers: Layers) -> Ints:
    """`visible_before` of the mask for many documents at once, summed over layers."""
    total = np.zeros_like(offsets)
    for window, count in layers:
        if window is None:
            first = np.minimum(offsets, prefixes)
            pairs = first * prefixes + (offsets * (offsets + 1) - first * (first + 1)) // 2
        else:
            first = np.minimum(offsets, window)
            pairs = first * (first + 1) // 2 + (offsets - first) * window
        total += count * pairs
    return total


def _one_row(work: Sequence[tuple[Mask, int]]) -> tuple[Mask, Layers]:
    """The row that all masks are of, without its window, and its layers by window."""
    if not work:
        raise UsageError("a balanced layout needs the mask of at least one layer, and got none: pass [(mask, 1)]")
    mask, layers = work[0][0], Counter[int | None]()
    for other, count in work:
        if _row_of(other) != _row_of(mask):
            raise UsageError(
                f"a balanced layout got masks of different rows, of {mask.length} and {other.length} tokens: the masks "
                f"of a row's layers may differ in their windows only; derive them by mask.with_window"
            )
        layers[other.window] += count
    return mask, tuple(layers.items())
