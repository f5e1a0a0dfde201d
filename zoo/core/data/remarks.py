"""Remarks on samples, counted by kind with the first places: what a run and `zoo data check` warn about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.core.contracts.data import Remark

PLACES = 3
"""How many places of a kind are kept."""

KINDS = 16
"""A kind may hold a name out of the data; those that come after so many are counted together."""

OTHERS = "remarks of further kinds"


@dataclass(frozen=True, slots=True)
class Spot:
    """A place inside a record. A string is made of it when it is asked for, because that may count lines of a file."""

    where: object
    place: str

    def __str__(self) -> str:
        return f"{self.where} {self.place}".rstrip()


@dataclass(frozen=True, slots=True)
class Tally:
    """Remarks of one kind."""

    count: int
    first: tuple[object, ...] = field(default=(), compare=False)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, (self.first + other.first)[:PLACES])


@dataclass(frozen=True, slots=True)
class Remarks:
    """What was remarked so far. Its size does not grow with the corpus."""

    tallies: Mapping[str, Tally] = field(default_factory=dict)

    @classmethod
    def of(cls, where: object, remarks: Sequence[Remark]) -> Remarks:
        """Count the remarks on one record."""
        return sum((cls({one.kind: Tally(1, (Spot(where, one.place),))}) for one in remarks), cls())

    def __add__(self, other: Remarks) -> Remarks:
        if not other.tallies:
            return self
        added = dict(self.tallies)
        for kind, tally in other.tallies.items():
            key = kind if kind in added or len(added) < KINDS else OTHERS
            added[key] = added[key] + tally if key in added else tally
        return Remarks(added)

    def settled(self) -> Remarks:
        """Return the same with every place as a string, so that lines are counted once."""
        return Remarks({kind: Tally(one.count, tuple(map(str, one.first))) for kind, one in self.tallies.items()})

    def as_json(self) -> dict[str, Any]:
        return {kind: {"count": one.count, "first": list(map(str, one.first))} for kind, one in self.tallies.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Remarks:
        return cls({kind: Tally(one["count"], tuple(one["first"])) for kind, one in value.items()})

    def lines(self) -> Iterator[str]:
        """Say each kind in a line."""
        for kind, one in self.tallies.items():
            more = ", ..." if one.count > len(one.first) else ""
            yield f"{one.count:,} {kind} ({', '.join(map(str, one.first))}{more})"
