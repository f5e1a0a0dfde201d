"""Real gloo ranks for tests: processes that share one import of torch and run functions for any world size.

    from zoo.testing import ranks

    def total(value):                         # module level: it travels by name
        x = torch.tensor([value + dist.get_rank()])
        dist.all_reduce(x)
        return x

    @pytest.mark.dist
    def test_total():
        assert ranks.run(4, total, 1) == [10] * 4

`run(world, function, *args)` calls `function(*args)` on ranks 0 to world-1 and returns their results in rank order.
Ranks run with one thread, seed 0, gloo on the loopback, RANK, LOCAL_RANK and WORLD_SIZE set. The default process
group has `world` ranks; it is made anew when the world size changes, in the same processes. With `group=False` there is
none: the function makes one and destroys it. Arguments and results are pickled (tensors by value). If a rank raises,
dies, or is not done in `timeout` seconds, all ranks are ended and RankError carries that rank's traceback; the next
`run` starts new ones. The processes end with the session.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zoo.core.launch.process_group import forget_meshes

IMPORTED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "zoo.core.run.train"]
"""Modules that ranks have imported before they begin. Whoever wants others changes the list before the first call."""

TIMEOUT_S = 900.0
"""So long that only what hangs is given up, on any machine and however busy it is."""

_DEATH_S = 1.0
"""How long after a rank failed the end of another one may come to be known."""

MANY_THREADS = 40
"""Every process group has threads, which outlive it and wake up a hundred times a second. Ranks with more than so many
are replaced by new ones, which takes less than a tenth of a second each."""


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


class RankPool:
    """Processes that wait for functions to run."""

    def __init__(self) -> None:
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="zoo-ranks-"))
        self._generation = 0
        self._world = 0
        self._threads = 0
        """The most that a rank had after its last function."""

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_S, group: bool = True
    ) -> list[Any]:
        """Call `function(*args)` on ranks 0 to world - 1 and return their results. Raise RankError."""
        if self._threads > MANY_THREADS:
            self.end()
        joined = world if group else 0
        if joined != self._world:
            self._generation += 1
            self._world = joined
        store = str(self._folder / f"store-{self._generation}") if group else None
        while len(self._ranks) < world:
            self._ranks.append(_start())
        for rank in range(world):
            self._ranks[rank][1].send_bytes(pickle.dumps((rank, world, store, timeout, function, args)))
        try:
            return self._collect(world, timeout)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End all processes. The next run starts new ones."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()
        self._world = self._threads = 0

    def close(self) -> None:
        """End all processes and delete their folder."""
        self.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _collect(self, world: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        waiting: dict[Any, int] = {self._ranks[rank][1]: rank for rank in range(world)}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} of {world} were not done in {timeout:.0f} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank] = self._receive(rank, pipe)
                except RankError:
                    self._raise_if_one_died(waiting)
                    raise
        return [results[rank] for rank in range(world)]

    def _raise_if_one_died(self, waiting: dict[Any, int]) -> None:
        """Raise RankError if one of these ranks is gone: what others say of lost connections comes of that."""
        connection.wait([self._ranks[rank][0].sentinel for rank in waiting.values()], _DEATH_S)
        for pipe, rank in waiting.items():
            if self._ranks[rank][0].exitcode is not None:
                self._receive(rank, pipe)

    def _receive(self, rank: int, pipe: Any) -> Any:
        try:
            succeeded, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            process = self._ranks[rank][0]
            process.join(5)
            raise RankError(f"rank {rank} died with exit code {process.exitcode}") from None
        if not succeeded:
            raise RankError(f"rank {rank} raised:\n{value}")
        result, threads = value
        self._threads = max(self._threads, threads)
        return result


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_S, group: bool = True
) -> list[Any]:
    """Call `function(*args)` on `world` ranks of the session's pool; their results in rank order."""
    return _pool().run(world, function, *args, timeout=timeout, group=group)


_POOLS: list[RankPool] = []


def _pool() -> RankPool:
    if not _POOLS:
        _POOLS.append(RankPool())
        atexit.register(_POOLS[0].close)
    return _POOLS[0]


def _start() -> tuple[BaseProcess, Connection]:
    # Ranks are forked from one process that has imported torch and computed nothing.
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    """Until the pipe closes, take a function, run it, send the result: the body of a rank."""
    torch.set_num_threads(1)
    store = None
    while True:
        try:
            rank, world, wanted, timeout, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        except Exception:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            continue
        try:
            if store is None or store != wanted:
                store = _join(rank, world, wanted, timeout)
            torch.manual_seed(0)
            answer: tuple[bool, Any] = (True, (function(*args), len(os.listdir("/proc/self/task"))))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _join(rank: int, world: int, store: str | None, timeout: float) -> str | None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    # Said by every launcher; nobody meets there, unless the function says where.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_meshes()
    if store is not None:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    return store
