"""From slices to launches: how many rectangles a kernel of variable lengths can compute at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zoo import AttentionSlice, SliceRule
from zoo.core.sequence.ranges import Range


class Band(NamedTuple):
    """Queries `[q_start, q_stop)` that see keys from `k_start` on: to `k_stop`, or, if `causal`, the last query to
    `k_stop` and each one before it one key less (aligned at the bottom right, as flash attention has it)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool


Launch = tuple[Band, ...]


def bands(slices: Sequence[AttentionSlice]) -> Launch:
    """Slices by ascending query; one whose keys go on where another one of the same queries ends joins it."""
    found: list[Band] = []
    for s in sorted(slices, key=lambda s: (s.q_start, s.q_stop, s.k_start)):
        new = Band(s.q_start, s.q_stop, s.k_start, s.k_stop, s.rule is SliceRule.CAUSAL)
        last = found[-1] if found else None
        if last and last[:2] == new[:2] and last.k_stop == new.k_start and not last.causal:
            found[-1] = new._replace(k_start=last.k_start)
        else:
            found.append(new)
    return tuple(found)


def launches(slices: Sequence[AttentionSlice], may_follow: Callable[[Band, Band], bool]) -> tuple[Launch, ...]:
    """The bands of slices, shared out over launches, first fit: each follows the last band of its launch."""
    found: list[list[Band]] = []
    for band in bands(slices):
        launch = next((launch for launch in found if may_follow(launch[-1], band)), None)
        if launch is None:
            found.append([band])
        else:
            launch.append(band)
    return tuple(tuple(launch) for launch in found)


def box(launch: Launch) -> tuple[Range, Range]:
    """The smallest ranges of query and key rows that hold a launch."""
    queries = min(b.q_start for b in launch), max(b.q_stop for b in launch)
    return queries, (min(b.k_start for b in launch), max(b.k_stop for b in launch))


def shifted(launch: Launch, queries: int, keys: int) -> Launch:
    """A launch in rows counted from `queries` and `keys`."""
    return tuple(
        Band(b.q_start - queries, b.q_stop - queries, b.k_start - keys, b.k_stop - keys, b.causal) for b in launch
    )
