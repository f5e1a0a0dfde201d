"""The one mesh: named axes in a fixed order, checked as arithmetic before any process group exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zoo.core.errors import LayoutError
from zoo.core.job import LayoutSection

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: tensor-parallel ranks are neighbours, then context-parallel ones."""
PEER_AXES = ("pp", "cp", "tp")
"""Ranks that differ only in these work on the same rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How many ranks each axis has. `ep` folds over dp_shard x cp and adds no ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """How many different rows are worked on at once."""
        return self.dp_replicate * self.dp_shard

    def mapping(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in (*AXES, "ep")}

    def describe(self) -> str:
        """As `cp 8` or `dp_shard 2 x cp 4, ep 8 over them`; `single process` when nothing is parallel."""
        ranks = " x ".join(f"{axis} {degree}" for axis in AXES if (degree := getattr(self, axis)) > 1)
        return (ranks or "single process") + (f", ep {self.ep} over them" if self.ep > 1 else "")


def check_degrees(layout: LayoutSection) -> None:
    """Raises LayoutError if one is less than 1."""
    for axis in (*AXES, "ep"):
        degree = getattr(layout, axis)
        if degree is not None and degree < 1:
            raise LayoutError(f"{_flag(axis)} {degree}: a degree is at least 1")


def resolve_degrees(
    layout: LayoutSection, *, world_size: int | None, available: int | None, said: str = "this launcher started"
) -> Degrees:
    """Fill unset degrees. `world_size` is fixed by whom `said` names, `available` counts accelerators, if any.

    Where neither says how many ranks there are, an unset dp_shard is the least that --ep needs.

    Raises LayoutError if the product cannot be the number of ranks.
    """
    check_degrees(layout)
    others = {axis: getattr(layout, axis) or 1 for axis in AXES if axis != "dp_shard"}
    fixed, ep, cp = math.prod(others.values()), layout.ep or 1, others["cp"]
    target = world_size or available or fixed * (layout.dp_shard or ep // math.gcd(ep, cp))
    dp_shard = layout.dp_shard or max(1, target // fixed)
    ranks = fixed * dp_shard
    asked = " x ".join(
        f"{_flag(axis)} {value}" for axis in AXES if (value := getattr(layout, axis)) is not None and value > 1
    )
    if world_size is not None and ranks != world_size:
        needed = f"{ranks} ranks" if layout.dp_shard else f"a multiple of {fixed} ranks"
        raise LayoutError(
            f"{asked or 'one process'} needs {needed} and {said} {world_size}",
            f"start {fixed * max(1, world_size // fixed)}, or choose degrees whose product divides {world_size}",
        )
    # An outer launcher's ranks may be on several machines, and it saw to the accelerators.
    if world_size is None and available is not None and ranks > available:
        raise LayoutError(
            f"{asked} needs {ranks} ranks and this machine has {available} accelerators",
            "lower a degree, or start more machines with torchrun",
        )
    _check_fold(ep, dp_shard, cp)
    return Degrees(dp_shard=dp_shard, ep=ep, **others)


def _check_fold(ep: int, dp_shard: int, cp: int) -> None:
    ranks = dp_shard * cp
    if ranks % ep == 0:
        return
    near = sorted((d for d in range(1, ranks + 1) if ranks % d == 0), key=lambda d: abs(d - ep))[:2]
    choices = " or ".join(f"--ep {degree}" for degree in sorted(near))
    raise LayoutError(
        f"--ep {ep} must divide --dp-shard {dp_shard} x --cp {cp} = {ranks} ranks, over which experts are dealt out",
        f"nearest: {choices}, or choose --dp-shard and --cp whose product is a multiple of {ep}",
    )


class Mesh:
    """Meshes by name; all process groups are made here.

    Every axis of `AXES`; `fsdp` = dp_shard x cp; and for experts the same ranks as `efsdp` x `ep` (`efsdp` alone
    without expert parallelism): those of an `ep` group are neighbours, those of an `efsdp` group share experts.

    With copies over dp_replicate, `hsdp` is the plane dp_replicate x fsdp and `ddp` the same ranks as one axis;
    `ehsdp` and `eddp` are those of dp_replicate x efsdp. Without copies the four are `fsdp` and `efsdp` themselves.
    """

    def __init__(self, degrees: Degrees, device_type: str) -> None:
        self.device_type = device_type
        sizes = tuple(getattr(degrees, axis) for axis in AXES)
        self._root = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        self._axes = {axis: self._root[axis] for axis in AXES}
        fsdp = self._axes["fsdp"] = self._root["dp_shard", "cp"]._flatten("fsdp")
        self._axes["efsdp"] = fsdp
        if degrees.ep > 1:
            # Of the same root as `fsdp`, without which FSDP2 and DTensor refuse to combine the two.
            experts = fsdp._unflatten(0, (fsdp.size() // degrees.ep, degrees.ep), ("efsdp", "ep"))
            self._axes |= {axis: experts[axis] for axis in ("efsdp", "ep")}
        self._axes["hsdp"], self._axes["ddp"] = self._with_copies("fsdp", "ddp")
        self._axes["ehsdp"], self._axes["eddp"] = self._axes["hsdp"], self._axes["ddp"]
        if degrees.ep > 1:
            self._axes["ehsdp"], self._axes["eddp"] = self._with_copies("efsdp", "eddp")
        self._host = {axis: self._host_group(axis) for axis in PEER_AXES if getattr(degrees, axis) > 1}

    def _with_copies(self, axis: str, flat: str) -> tuple[DeviceMesh, DeviceMesh]:
        """The plane dp_replicate x axis, and the same ranks as one axis named `flat`; without copies, the axis."""
        if self.size("dp_replicate") == 1:
            return self._axes[axis], self._axes[axis]
        plane = DeviceMesh._concatenate([self._axes["dp_replicate"], self._axes[axis]])
        return plane, plane._flatten(flat)

    def __getitem__(self, axis: str) -> DeviceMesh:
        """The ranks that differ from this one in that axis only; in two of them for `hsdp` and `ehsdp`."""
        return self._axes[axis]

    def host_group(self, axis: str) -> ProcessGroup:
        """The same ranks over gloo, for what a thread does beside the step: messages of one never meet the other's.

        Only for the axes of `PEER_AXES` whose degree exceeds 1.
        """
        return self._host[axis]

    def _host_group(self, axis: str) -> ProcessGroup:
        lines = self._root.mesh.movedim(AXES.index(axis), -1).reshape(-1, self.size(axis)).tolist()
        group: ProcessGroup
        group, _ = dist.new_subgroups_by_enumeration(lines, backend="gloo")  # type: ignore[no-untyped-call]
        return group

    def rank(self, axis: str) -> int:
        """This rank's place on an axis."""
        return self._axes[axis].get_local_rank()

    def size(self, axis: str) -> int:
        """The degree of an axis."""
        return self._axes[axis].size()


def _flag(axis: str) -> str:
    return "--" + axis.replace("_", "-")
