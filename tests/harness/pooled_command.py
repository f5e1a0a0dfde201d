"""`zoo finetune` whose ranks are processes of the pool: all of the command but the start of interpreters.

Argument parsing, plugins, job, preparation, launcher, the folder it talks through, what a worker process runs, process
groups, training, metrics, saves and the launcher's verdict are the command's own. Only what starts a process a rank and
waits for them has a stand-in, which hands the same work and folder to ranks that run.
"""

from __future__ import annotations

import io
import os
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

from tools.layout_cases import untimed
from zoo.cli.main import main
from zoo.core.launch import launcher
from zoo.core.launch.serve import answer
from zoo.core.launch.watchdog import WatchedHeartbeat
from zoo.core.machine.launcher_env import STORE_FILE
from zoo.core.run.metrics import read_metrics
from zoo.core.run.worker import TRAINING, train_as_asked
from zoo.testing import ranks


def train(out, *args):
    """`zoo finetune ARGS --out OUT` to its end, and the objects of its metrics.jsonl without times and memory."""
    command("finetune", *args, "--out", out)
    return untimed(read_metrics(Path(out) / "metrics.jsonl"))


def command(*args, status=0):
    """A command line to its end; asserts its exit status."""
    with _ranks_of_the_pool():
        assert main([str(word) for word in args]) == status, args


def joined(*command_of_rank, **environment):
    """Run a command line on each rank of an outer launcher; return (status, what it wrote to stderr) of each."""
    return [answer for (answer,) in _in_turn([[words] for words in command_of_rank], environment)]


def joined_in_turn(commands, *, world):
    """Run command lines one after the other in the same ranks of an outer launcher; return the answers of each rank."""
    return _in_turn([commands] * world, {})


def _in_turn(commands_of_rank, environment):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lines = [[[str(word) for word in words] for words in commands] for commands in commands_of_rank]
    with tempfile.TemporaryDirectory() as run_id:
        return ranks.run(len(lines), _be_joined, lines, store.port, run_id, environment, group=False)


def _be_joined(lines, port, run_id, environment):
    """On a rank: what a process of torchrun does."""
    launched = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"TORCHELASTIC_RUN_ID": run_id, STORE_FILE: "", **environment},
    }
    commands = lines[int(os.environ["RANK"])]
    with mock.patch.dict(os.environ, launched):
        return [_answer(words) for words in commands]


def _answer(words):
    with tempfile.TemporaryFile("w+") as said, redirect_stdout(io.StringIO()), redirect_stderr(said):
        status = main(words)
        said.seek(0)
        return status, said.read()


@contextmanager
def _ranks_of_the_pool():
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(launcher, "RankProcesses", _PooledRanks),
    ):
        yield


class _PooledRanks:
    """In the place of `RankProcesses`."""

    def __init__(self, command, num_ranks, environment):
        *_, target, self._folder = command
        assert target == TRAINING.target
        self._num_ranks = num_ranks
        # Not the launcher's process id and the threads of a process of its own.
        self._environment = {STORE_FILE: environment[STORE_FILE]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self, given_up):
        try:
            ranks.run(self._num_ranks, _be_a_worker, self._folder, self._environment, group=False)
        except ranks.RankError:
            # The first rank that fails ends all others; which it was is in the folder.
            left = [int(path.stem) for path in Path(self._folder).glob("[0-9]*.error")] or [0]
            return dict.fromkeys(left, 1)
        return {}


def _be_a_worker(folder, environment):
    """On a rank: what a process of the launcher does until it ends."""
    heartbeat = WatchedHeartbeat(Path(folder), int(os.environ["RANK"]))
    with mock.patch.dict(os.environ, environment):
        assert answer(train_as_asked, Path(folder), heartbeat) == 0
