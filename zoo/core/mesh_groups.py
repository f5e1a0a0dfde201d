"""Which ranks form the groups of each axis, as arithmetic: what `Mesh` makes, without a process."""

from __future__ import annotations

from zoo.core.mesh import AXES, Degrees

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
