"""Mesh axes, their degrees, and which ranks form the groups of each: arithmetic without a process. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: tensor-parallel ranks are neighbours, then context-parallel ones."""
EVERY_AXIS = (*AXES, "ep")
"""With the one that folds over dp_shard x cp and adds no ranks."""
PEER_AXES = ("pp", "cp", "tp")
"""Ranks that differ only in these work on the same rows."""

_OUTSIDE_FSDP = ("pp", "dp_replicate", "tp")
_SHARED = {
    **{axis: tuple(other for other in AXES if other != axis) for axis in AXES},
    "fsdp": _OUTSIDE_FSDP,
    "efsdp": (*_OUTSIDE_FSDP, "ep"),
    "ep": (*_OUTSIDE_FSDP, "efsdp"),
    "ddp": ("pp", "tp"),
    "eddp": ("pp", "tp", "ep"),
    "world": (),
}
"""The coordinates that ranks of a group have in common, by axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How many ranks each axis has. `ep` folds over dp_shard x cp and adds no ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __getitem__(self, axis: str) -> int:
        """Return the degree of an axis by its name."""
        degree: int = getattr(self, axis)
        return degree

    @property
    def world_size(self) -> int:
        return math.prod(self[axis] for axis in AXES)

    @property
    def dp(self) -> int:
        """How many different rows are worked on at once."""
        return self.dp_replicate * self.dp_shard

    def mapping(self) -> dict[str, int]:
        """Return the degrees by axis, in the order of `EVERY_AXIS`."""
        return {axis: self[axis] for axis in EVERY_AXIS}

    def in_use(self) -> Iterator[str]:
        """Return the axes with more than one rank."""
        return (axis for axis in EVERY_AXIS if self[axis] > 1)

    def describe(self) -> str:
        """Return `cp 8` or `dp_shard 2 x cp 4, ep 8 over them`; `single process` when nothing is parallel."""
        ranks = " x ".join(f"{axis} {self[axis]}" for axis in AXES if self[axis] > 1)
        return (ranks or "single process") + (f", ep {self.ep} over them" if self.ep > 1 else "")


def flag(axis: str) -> str:
    """Return the command line's flag for an axis: `--dp-shard`."""
    return "--" + axis.replace("_", "-")


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number, ascending."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def coordinates(degrees: Degrees, rank: int) -> dict[str, int]:
    """A rank's place on every axis: those of `AXES`, `fsdp` (dp_shard x cp), and for experts `efsdp` x `ep`."""
    place, rest = {}, rank
    for axis in reversed(AXES):
        rest, place[axis] = divmod(rest, getattr(degrees, axis))
    place["fsdp"] = place["dp_shard"] * degrees.cp + place["cp"]
    place["efsdp"], place["ep"] = divmod(place["fsdp"], degrees.ep)
    return place


def groups(degrees: Degrees, axis: str) -> list[list[int]]:
    """The groups of an axis, each with its ranks in order, sorted by their first rank."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(degrees.world_size):
        place = coordinates(degrees, rank)
        found.setdefault(tuple(place[other] for other in _SHARED[axis]), []).append(rank)
    return list(found.values())


def drawn_axes(degrees: Degrees) -> list[str]:
    """The axes worth a look, innermost first: of degree above 1, `fsdp` where it is more than one of them, experts'."""
    axes = [axis for axis in reversed(AXES) if getattr(degrees, axis) > 1]
    if degrees.dp_shard > 1 and degrees.cp > 1:
        axes.append("fsdp")
    if degrees.ep > 1:
        axes.append("ep")
        axes += ["efsdp"] if degrees.dp_shard * degrees.cp > degrees.ep else []
    return axes
