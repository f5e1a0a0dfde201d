"""The process group of all ranks: what a rank joins before anything else, and leaves last."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zoo.core.device import accelerator_type, num_accelerators
from zoo.core.errors import UsageError
from zoo.core.launcher_env import OuterRank
from zoo.core.watchdog import DEFAULT_TIMEOUT_S, MARGIN_S

_SAME_STORE = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_STORES: dict[tuple[str, ...], tuple[Store, Iterator[int]]] = {}


@contextmanager
def process_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[torch.device]:
    """The world, and this rank's device: gloo for the host, and the accelerator's own backend beside it.

    torch's own timeouts come after those of the watchdog, which say more.
    """
    if dist.is_initialized():
        raise UsageError(
            "this process already has a process group of torch; call torch.distributed.destroy_process_group() before "
            "zoo.finetune, or call zoo.finetune in a process of its own"
        )
    device, outer = _device(), OuterRank.from_environment()
    kind, timeout = device.type, timedelta(seconds=timeout_s + MARGIN_S)
    dist.init_process_group(
        "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}",
        store=_meeting_place(timeout) if outer and outer.world_size > 1 else HashStore(),
        rank=outer.rank if outer else 0,
        world_size=outer.world_size if outer else 1,
        timeout=timeout,
    )
    try:
        if kind != "cpu":
            torch.accelerator.set_device_index(device)
        yield device
    finally:
        dist.destroy_process_group()
        forget_meshes()


def _device() -> torch.device:
    """Return this rank's device. Raise UsageError if a launcher does not say which of several accelerators it is."""
    kind, outer = accelerator_type(), OuterRank.from_environment()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind, outer.device_index(num_accelerators()) if outer else 0)


def _meeting_place(timeout: timedelta) -> Store:
    """Return the launcher's store, under a prefix of its own for each group that this process joins.

    The addresses that ranks left there for a group before are no good any more. The store itself is kept: rank 0 may
    serve it, and a second server would have to wait for the port.
    """
    key = tuple(os.environ.get(name, "") for name in _SAME_STORE)
    if key not in _STORES:
        _STORES[key] = next(rendezvous("env://", timeout=timeout))[0], count()
    store, numbers = _STORES[key]
    store.set_timeout(timeout)
    return PrefixStore(f"zoo-{next(numbers)}", store)


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


def host_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> dist.ProcessGroup:
    """All ranks over gloo once more, for what a thread does beside the step; collective."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s + MARGIN_S))
    return group


def lost_touch(error: BaseException) -> bool:
    """Whether a collective failed because other ranks are gone or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
