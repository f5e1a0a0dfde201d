"""How many values the parameters of a model have, by what may cut them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zoo.core.mesh.degrees import Degrees


class Values(NamedTuple):
    """Numbers of parameter values."""

    cut: int = 0
    """In what `tp` cuts."""
    rest: int = 0
    expert: int = 0
    """In what `ep` deals out."""

    def plus(self, other: Values) -> Values:
        return Values(*(a + b for a, b in zip(self, other, strict=True)))

    def dense(self, degrees: Degrees) -> float:
        """Return those of a rank before data parallelism cuts, experts aside."""
        return self.cut / degrees.tp + self.rest

    def experts(self, degrees: Degrees) -> float:
        return self.expert / degrees.ep

    def here(self, degrees: Degrees) -> float:
        return self.dense(degrees) + self.experts(degrees)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelValues:
    """The parameters of a model; tied ones counted once."""

    blocks: Sequence[Values] = ()
    ends: Values = Values()  # noqa: RUF009 - frozen
    """All that is in no block: embedding, last norm, head."""

    @property
    def total(self) -> Values:
        return sum_of([*self.blocks, self.ends])


def sum_of(values: Sequence[Values]) -> Values:
    """Added up, kind by kind."""
    total = Values()
    for each in values:
        total = total.plus(each)
    return total
