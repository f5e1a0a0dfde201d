"""Where ranks find each other: the store of a launcher, in which ranks that no torchrun numbered say who they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

from zoo.core.errors import UsageError, one_line
from zoo.core.launch.collective import host_name
from zoo.core.machine.launcher_env import STORE_FILE, OuterRank

PATIENCE = timedelta(days=7)
"""torch's own timeouts. Who hangs is the watchdog's affair, which says more, and knows of jobs that are suspended."""

_SAME_STORE = (STORE_FILE, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_STORES: dict[tuple[str, ...], tuple[Store, Iterator[int]]] = {}
_GOOD = "all ranks are there"
_LINGER_S = 5.0
"""How long the rank that serves the store waits at most for the others to read why there is no job."""


def meeting_place(outer: OuterRank) -> Store:
    """Return the launcher's store, under a prefix of its own for each group that this process joins.

    The addresses that ranks left there for a group before are no good any more. The store itself is kept: rank 0 may
    serve it, and a second server would have to wait for the port. Raises UsageError if it cannot be served, and where
    ranks do not fit together.
    """
    key = tuple(os.environ.get(name, "") for name in _SAME_STORE)
    file = os.environ.get(STORE_FILE)
    numbered = not file and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if key not in _STORES:
        if file:
            opened: Store = FileStore(file, outer.world_size)
        elif numbered:
            opened = next(rendezvous("env://", timeout=PATIENCE))[0]
        else:
            opened = _store_of_ranks(outer)
        _STORES[key] = opened, count()
    store, numbers = _STORES[key]
    store.set_timeout(PATIENCE)
    place = PrefixStore(f"zoo-{next(numbers)}", store)
    if not file and not numbered:
        introduce(place, outer)
    return place


def introduce(store: Store, outer: OuterRank) -> None:
    """Wait until every rank is there; collective. Raise UsageError on all if two are the same, or count differently.

    zoo's launcher and torchrun number their ranks; a wrapper's variables may be wrong, and the ranks would only wait.
    """
    wrong = _contradiction(store, outer)
    arrived = store.add("arrived", 1)
    if wrong or arrived == outer.world_size:
        store.compare_set("verdict", "", wrong or _GOOD)
    verdict = store.get("verdict").decode()
    if wrong or verdict != _GOOD:
        heard = store.add("heard", 1)
        until = time.monotonic() + _LINGER_S
        while outer.rank == 0 and heard < store.add("arrived", 0) and time.monotonic() < until:
            time.sleep(0.01)
            heard = store.add("heard", 0)
        raise UsageError(wrong or verdict)


def _contradiction(store: Store, outer: OuterRank) -> str:
    """Say how this rank does not fit to one that came before it; nothing if it does."""
    own = f"process {os.getpid()} on host {host_name()}"
    if store.add(f"processes of rank {outer.rank}", 1) == 1:
        store.set(f"rank {outer.rank}", own)
    else:
        first = store.get(f"rank {outer.rank}").decode()
        return (
            f"RANK is {outer.rank} for two processes: {first}, and {own}; a launcher gives each its own number from 0 "
            "to WORLD_SIZE - 1. If one was started again alone, start all again"
        )
    own = f"{outer.world_size} on rank {outer.rank} (host {host_name()})"
    first = store.compare_set("WORLD_SIZE", "", own).decode()
    if first.partition(" ")[0] != str(outer.world_size):
        return f"WORLD_SIZE is {first} and {own}; set it to the same on all ranks"
    return ""


def _store_of_ranks(outer: OuterRank) -> Store:
    """Return the store that rank 0 serves at MASTER_ADDR and MASTER_PORT."""
    address, port = os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"])
    try:
        # Not to be waited for here: how many ranks come is the first thing in which they may differ.
        return TCPStore(
            address, port, is_master=outer.rank == 0, timeout=PATIENCE, wait_for_workers=False, multi_tenant=True
        )
    except DistError as error:
        reason = one_line(error).rpartition("message: ")[2]
        if outer.rank:
            raise UsageError(
                f"rank {outer.rank} cannot reach port {port} of {address} (MASTER_ADDR): {reason}"
            ) from None
        raise UsageError(
            f"MASTER_PORT {port} cannot be opened on rank 0: {reason}; another program has it, or two processes have "
            "RANK 0. Set MASTER_PORT to a free one on all ranks"
        ) from None
