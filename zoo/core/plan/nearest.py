"""The layouts nearest to one that was refused: a search over flags, by how few of them change, then by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import Any

from zoo.core.job.flags import FLAGS
from zoo.core.job.job import DataSection, Job, LayoutSection
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import AXES

_DEGREES = (*AXES, "ep")
_SHOWN = 2
_MOST_CHANGES = 3
"""Where so many change, only those that somebody gave, and numbers to powers of two."""
_MOST_TRIES = 3000
_OTHERS = tuple(field.name for field in fields(LayoutSection) if field.name not in (*_DEGREES, "degrees", "timeout"))
"""Settings of the layout that are put back to what they are if nobody says anything."""


@dataclass(frozen=True, slots=True)
class _Change:
    """One setting, given anew."""

    key: str
    value: Any
    cost: float
    """How far it is from what was asked for."""

    @property
    def is_round(self) -> bool:
        return not isinstance(self.value, int) or self.value & (self.value - 1) == 0

    def typed(self) -> str:
        """As it is typed, or `no --pp-virtual`."""
        flag = next((f"--{flag.name}" for flag in FLAGS if flag.key == self.key), None)
        if flag is None:
            return f"--set {self.key}={'null' if self.value is None else str(self.value).lower()}"
        if self.value is None:
            return f"no {flag}"
        return f"{flag} {self.value}"


def nearest(job: Job, works: Callable[[Job], bool], machine: Machine, *, only_given: bool = False) -> list[str]:
    """Up to two layouts that work, as flags to type; those that change fewest settings, then the smallest change.

    With `only_given` nothing is changed that nobody gave, and a flag may be left out.
    """
    options = _options(job, machine)
    if only_given:
        options = {
            key: some if any(c.value is None for c in some) else [*some, _Change(key, None, 1.0)]
            for key, some in options.items()
            if key.removeprefix("layout.") in _DEGREES and _given(job, key)
        }
    tries = 0
    for count in range(1, _MOST_CHANGES + 1):
        if count == _MOST_CHANGES:
            options = {key: [c for c in some if c.is_round] for key, some in options.items() if _given(job, key)}
        ways = sorted(
            (way for keys in combinations(options, count) for way in product(*(options[key] for key in keys))),
            key=lambda way: (
                sum(change.cost for change in way),
                sum(not _given(job, change.key) for change in way),
                [change.typed() for change in way],
            ),
        )
        found: list[tuple[_Change, ...]] = []
        for way in ways[: _MOST_TRIES - tries]:
            tries += 1
            if works(_changed(job, way)):
                found.append(way)
                if len(found) == _SHOWN:
                    break
        if found:
            found.sort(key=lambda way: [(c.key, c.value if isinstance(c.value, int) else 0) for c in way])
            return [" ".join(change.typed() for change in way) for way in found]
    return []


def nearest_numbers(wanted: int, last: int, fits: Callable[[int], bool]) -> list[int]:
    """Return the two numbers of 1 to `last` that fit and are nearest, ascending."""
    return sorted(sorted(filter(fits, range(1, last + 1)), key=lambda n: abs(n - wanted))[:2])


def _given(job: Job, key: str) -> bool:
    section, _, name = key.partition(".")
    return bool(getattr(getattr(job, section), name) != getattr(getattr(Job(), section), name))


def _changed(job: Job, way: tuple[_Change, ...]) -> Job:
    for change in way:
        section, _, name = change.key.partition(".")
        job = job.replace(section, **{name: change.value})
    return job


def _options(job: Job, machine: Machine) -> Mapping[str, list[_Change]]:
    """What may be changed, and to what, by key."""
    limit = machine.ranks or machine.most or 64
    options: dict[str, list[_Change]] = {}
    for axis in _DEGREES:
        options[f"layout.{axis}"] = list(_degree(f"layout.{axis}", getattr(job.layout, axis), limit))
    plain = LayoutSection()
    for name in _OTHERS:
        if getattr(job.layout, name) != getattr(plain, name):
            options[f"layout.{name}"] = [_Change(f"layout.{name}", getattr(plain, name), 0.5)]
    if (job.layout.pp or 1) > 1:
        options.setdefault("layout.pp_virtual", []).extend(
            _Change("layout.pp_virtual", n, 1.0 + 0.1 * n) for n in range(2, 5) if n != job.layout.pp_virtual
        )
    if job.data.global_batch is not None:
        options["data.global_batch"] = list(_near("data.global_batch", job.data.global_batch, 4 * limit, extra=0.0))
    if job.data.micro_batch != DataSection().micro_batch:
        options["data.micro_batch"] = list(_near("data.micro_batch", job.data.micro_batch, job.data.micro_batch, 0.5))
    cp = job.layout.cp or 1
    # Rows of another length are another task, so this comes last.
    lengths = {max(1, job.data.seq // cp) * cp, -(-job.data.seq // cp) * cp} - {job.data.seq}
    if lengths:
        options["data.seq"] = [_Change("data.seq", n, 5.0 + abs(n - job.data.seq) / n) for n in sorted(lengths)]
    return options


def _degree(key: str, value: int | None, limit: int) -> Iterator[_Change]:
    """Other degrees, and none given for dp_shard, which then fills the ranks."""
    if key == "layout.dp_shard" and value is not None:
        yield _Change(key, None, 1.0)
    yield from _near(key, 1 if value is None else value, limit, extra=0.0)


def _near(key: str, value: int, limit: int, extra: float) -> Iterator[_Change]:
    """The 12 numbers that are nearest by their ratio, and all powers of two, up to a limit."""
    positive = max(1, value)

    def away(number: int) -> float:
        return abs(math.log2(number / positive))

    span = range(max(1, positive // 4), min(limit, 4 * positive + 4) + 1)
    nearest_ones = sorted(span, key=away)[:13]
    powers = [1 << n for n in range(max(1, limit).bit_length())]
    for number in sorted({*nearest_ones, *powers}, key=away):
        if number != value and number <= limit:
            yield _Change(key, number, extra + away(number))
