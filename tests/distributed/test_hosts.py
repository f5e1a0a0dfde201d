"""A run on two hosts that lose each other: for a moment, for longer than they wait, and one of them for good."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.distributed.test_survival import children
from tests.harness.hosts import two_hosts
from tests.harness.patience import PATIENCE_S
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TIMEOUT_S = 25
"""Of a step. What TCP sends again after 5 s of silence arrives within another 7 s."""


class Job:
    """`torchrun -m zoo finetune` on both hosts, as docs/launch.md has it."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder, self.run = hosts, folder, folder / "run"
        self.logs = []

    def start(self, host, *, restarts, more=()):
        """Its launcher on one of the hosts."""
        self.logs.append(self.folder / f"{len(self.logs)}.log")
        launcher = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", restarts, "--rdzv-backend", "c10d")
        launcher += ("--rdzv-endpoint", "node-0:29500", "--rdzv-id", "1")
        # How soon a launcher that says nothing counts as gone.
        launcher += ("--rdzv-conf", "keep_alive_interval=1")
        job = ("llama3", "--seq", "256", "--cp", "2", "--steps", "100000", "--save-every", "1", "--out", self.run)
        words = ("-m", "torch.distributed.run", *launcher, "-m", "zoo", "finetune", *job, *more)
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "ZOO_STATUS_FILE": str(self.folder / f"{host.name}.status")}
        return host.start(sys.executable, *words, log=self.logs[-1], **env)

    def saved(self):
        return max(Checkpoints(self.run, keep=1).steps(), default=0)

    def goes_on(self):
        """Wait until two more steps are saved."""
        before = self.saved()
        self.until(lambda: self.saved() >= before + 2)

    def until(self, holds):
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, [log.read_text()[-3000:] for log in self.logs]
            time.sleep(0.05)

    def errors(self, log):
        return [line for line in log.read_text().splitlines() if line.startswith("Error: ")]


def test_hosts_that_lose_each_other_for_a_while_or_for_good(tmp_path):
    """One run through all of it, for starting on two hosts is what takes long."""
    with two_hosts(tmp_path) as hosts:
        job = Job(hosts, tmp_path)
        launchers = [job.start(host, restarts=0, more=("--set", f"layout.timeout={TIMEOUT_S}")) for host in hosts]
        job.goes_on()
        a_moment_is_survived(hosts, job)
        more_than_a_moment_is_an_error(hosts, job, launchers)
        del job.logs[:]
        launchers = [job.start(host, restarts=1) for host in hosts]
        job.goes_on()
        assert "resume  from step" in job.logs[0].read_text()
        a_host_is_replaced(hosts, job, launchers)
        a_warning_of_one_host_saves_on_both(hosts, job, launchers)
        steps = [row["step"] for row in read_metrics(job.run / "metrics.jsonl")]
        assert steps == list(range(1, job.saved() + 1))


def a_moment_is_survived(hosts, job):
    hosts[1].cut()
    time.sleep(5)
    hosts[1].mend()
    job.goes_on()
    assert [job.errors(log) for log in job.logs] == [[], []]


def more_than_a_moment_is_an_error(hosts, job, launchers):
    ranks = [pid for launcher in launchers for pid in ranks_below(launcher)]
    assert len(ranks) == 2
    hosts[1].cut()
    job.until(lambda: all(gone(pid) for pid in ranks))
    for rank, log in enumerate(job.logs):
        (error,) = job.errors(log)
        assert error.startswith(f"Error: no step ended in {TIMEOUT_S} s (layout.timeout): rank {rank} waits in ")
        assert error.endswith("The same command resumes from the last finished checkpoint")
    assert launchers[0].wait(PATIENCE_S) == 1
    # The other waits until it can reach the place where all meet.
    hosts[1].kill()
    hosts[1].mend()


def a_host_is_replaced(hosts, job, launchers):
    hosts[1].kill()
    launchers[1].wait(PATIENCE_S)
    launchers[1] = job.start(hosts[1], restarts=1)
    job.until(lambda: job.logs[0].read_text().count("resume  from step") == 2)
    job.goes_on()
    # Unless its launcher heard of the new host before the rank missed the old one.
    assert all("Error: rank 0 lost touch with other ranks: " in error for error in job.errors(job.logs[0]))


def a_warning_of_one_host_saves_on_both(hosts, job, launchers):
    (rank,) = ranks_below(launchers[1])
    os.kill(rank, signal.SIGUSR1)
    assert [launcher.wait(PATIENCE_S) for launcher in launchers] == [0, 0]
    assert [(job.folder / f"{host.name}.status").read_text() for host in hosts] == ["75", "75"]


def ranks_below(launcher):
    return [int(pid) for pid in children(launcher.pid, "finetune")]


def gone(pid):
    """Whether a process has ended and only its launcher has not taken note of it."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
