"""The process group of all ranks: what a rank joins before anything else, and leaves last."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zoo.core.device import accelerator_type
from zoo.core.launch import inside_launcher
from zoo.core.rank_processes import HERE

_PATIENCE = timedelta(days=7)
"""torch's own timeouts. Who hangs is the watchdog's affair, which says more, and knows of jobs that are suspended."""


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The world, and this rank's device: gloo for the host, and the accelerator's own backend beside it."""
    with without_names() if _one_machine() else nullcontext():
        yield from _process_group()


def _process_group() -> Iterator[torch.device]:
    kind = accelerator_type()
    backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}" if kind else "gloo"
    if inside_launcher():
        dist.init_process_group(backend, timeout=_PATIENCE)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    device = torch.device("cpu")
    if kind:
        device = torch.device(kind, dist.get_node_local_rank(fallback_rank=0))
        torch.accelerator.set_device_index(device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def without_names() -> Iterator[None]:
    """Let ranks of one machine meet over its loopback: looking up a host's own name may fail, or take minutes."""
    wanted = {"MASTER_ADDR": HERE}
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


def _one_machine() -> bool:
    """Whether all ranks are on this machine, as far as a launcher says."""
    return not inside_launcher() or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def any_rank(asked: bool) -> bool:
    """Whether it is so on some rank; collective, on the host."""
    flag = torch.tensor([int(asked)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo once more, for what a thread does beside the step; collective."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def lost_touch(error: BaseException) -> bool:
    """Whether a collective failed because other ranks are gone or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
