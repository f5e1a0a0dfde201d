"""The process group of all ranks: what a rank joins before anything else, and leaves last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zoo.core.device import accelerator_type
from zoo.core.launch import inside_launcher
from zoo.core.watchdog import DEFAULT_TIMEOUT_S, MARGIN_S


@contextmanager
def process_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[torch.device]:
    """The world, and this rank's device: gloo for the host, and the accelerator's own backend beside it.

    torch's own timeouts come after those of the watchdog, which say more.
    """
    kind = accelerator_type()
    backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}" if kind else "gloo"
    if inside_launcher():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s + MARGIN_S))
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


def host_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> dist.ProcessGroup:
    """All ranks over gloo once more, for what a thread does beside the step; collective."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s + MARGIN_S))
    return group


def lost_touch(error: BaseException) -> bool:
    """Whether a collective failed because other ranks are gone or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
