"""The process group of all ranks: what a rank joins before anything else, and leaves last."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zoo.core.errors import UsageError
from zoo.core.launch.meeting import PATIENCE, meeting_place
from zoo.core.machine.device import accelerator_type, num_accelerators
from zoo.core.machine.launcher_env import OuterRank


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The world, and this rank's device: gloo for the host, and the accelerator's own backend beside it."""
    if dist.is_initialized():
        raise UsageError(
            "this process already has a process group of torch; call torch.distributed.destroy_process_group() before "
            "zoo.finetune, or call zoo.finetune in a process of its own"
        )
    device, outer = _device(), OuterRank.from_environment()
    kind = device.type
    # Where ranks do not say how many of them a machine has, they may be on several.
    alone = outer is None or outer.world_size == (outer.local_world_size or 1)
    with without_names() if alone else nullcontext():
        dist.init_process_group(
            "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}",
            store=meeting_place(outer) if outer and outer.world_size > 1 else HashStore(),
            rank=outer.rank if outer else 0,
            world_size=outer.world_size if outer else 1,
            timeout=PATIENCE,
        )
        try:
            if kind != "cpu":
                torch.accelerator.set_device_index(device)
            yield device
        finally:
            dist.destroy_process_group()
            forget_meshes()


@contextmanager
def without_names() -> Iterator[None]:
    """Let ranks of one machine meet over its loopback: looking up a host's own name may fail, or take minutes."""
    wanted = {"MASTER_ADDR": "127.0.0.1"}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback and not os.environ.get("GLOO_SOCKET_IFNAME"):
        wanted["GLOO_SOCKET_IFNAME"] = loopback
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _device() -> torch.device:
    """Return this rank's device. Raise UsageError if a launcher does not say which of several accelerators it is."""
    kind, outer = accelerator_type(), OuterRank.from_environment()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind, outer.device_index(num_accelerators()) if outer else 0)


def forget_meshes() -> None:
    """Clear what DTensor caches by mesh: equal meshes of the next world would name groups of this one."""
    if "torch.distributed.tensor._redistribute" not in sys.modules:
        return
    redistribute = importlib.import_module("torch.distributed.tensor._redistribute")
    debug = importlib.import_module("torch.distributed.tensor.debug")
    # Private names, which another torch may not have.
    for owner, name in (
        (debug, "_clear_sharding_prop_cache"),
        (redistribute, "clear_redistribute_planner_cache"),
        (getattr(redistribute, "_gen_transform_infos", None), "cache_clear"),
    ):
        getattr(owner, name, lambda: None)()


def any_rank(asked: bool) -> bool:
    """Whether it is so on some rank; collective, on the host."""
    flag = torch.tensor([int(asked)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo once more, for what a thread does beside the step; collective."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


def lost_touch(error: BaseException) -> bool:
    """Whether a collective failed because other ranks are gone or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
