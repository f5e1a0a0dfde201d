"""The one mesh: named axes in a fixed order, and all process groups."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zoo.core.mesh.degrees import AXES, PEER_AXES, Degrees


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
