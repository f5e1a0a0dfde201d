"""Real gloo ranks for tests: processes that share one import of torch and run functions for any world size.

    from tests.distributed import ranks

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
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

from tests.patience import PATIENCE_S

MANY_THREADS = 100
"""Every process group has threads, which outlive it. Ranks with more than so many are replaced by new ones."""


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


class RankPool:
    """Processes that wait for functions to run."""

    def __init__(self):
        self._ranks = []
        self._folder = Path(tempfile.mkdtemp(prefix="zoo-ranks-"))
        self._generation = 0
        self._world = 0
        self._threads = 0
        """The most that a rank had after its last function."""

    def run(self, world, function, *args, timeout=PATIENCE_S, group=True):
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

    def end(self):
        """End all processes. The next run starts new ones."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()
        self._world = self._threads = 0

    def close(self):
        self.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _collect(self, world, timeout):
        results, deadline = {}, time.monotonic() + timeout
        waiting = {self._ranks[rank][1]: rank for rank in range(world)}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} of {world} were not done in {timeout:.0f} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank] = self._receive(rank, pipe)
        return [results[rank] for rank in range(world)]

    def _receive(self, rank, pipe):
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


def run(world, function, *args, timeout=PATIENCE_S, group=True):
    """Call `function(*args)` on `world` ranks of the session's pool; their results in rank order."""
    return _pool().run(world, function, *args, timeout=timeout, group=group)


_POOLS = []


def _pool():
    if not _POOLS:
        _POOLS.append(RankPool())
        atexit.register(_POOLS[0].close)
    return _POOLS[0]


def _start():
    # Ranks are forked from one process that has imported torch and computed nothing.
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_imports"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe):
    """Body of a rank: until the pipe closes, take a function, run it, send the result."""
    import torch

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
            answer = (True, (function(*args), len(os.listdir("/proc/self/task"))))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _join(rank, world, store, timeout):
    import torch.distributed as dist

    from zoo.core.launch.process_group import forget_meshes

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
