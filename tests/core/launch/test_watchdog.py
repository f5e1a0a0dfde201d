"""The watchdog on small processes: which of them hangs, which wait, what is shown of each, and that all are ended."""

import signal
import subprocess
import sys
import time

import pytest

from tests.harness.patience import PATIENCE_S
from zoo.core.launch.watchdog import Limits, Watchdog, WatchedHeartbeat

RANK = """
import os, sys, threading, time
from pathlib import Path
from zoo.core.launch.watchdog import WatchedHeartbeat

def wait_for_peers():
    threading.Event().wait()

def compute():
    while True:
        time.sleep(1)

folder, rank, what, beats = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
(folder / f"{rank}.pid").write_text(str(os.getpid()))
threading.Thread(target=compute, daemon=True).start()
with WatchedHeartbeat(folder, rank) as heartbeat:
    heartbeat.enters("joining the other ranks")
    for _ in range(beats):
        heartbeat.beat()
    (folder / f"{rank}.ready").touch()
    globals()[what]()
"""


@pytest.fixture
def ranks(tmp_path):
    """A function from (what, beats) pairs to processes that do it; they are ended after the test."""
    started = []

    def run(*parts):
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        for rank, (what, beats) in enumerate(parts):
            started.append(subprocess.Popen([sys.executable, script, tmp_path, str(rank), what, str(beats)]))
        deadline = time.monotonic() + PATIENCE_S
        while len(list(tmp_path.glob("*.ready"))) < len(parts):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in started)
            time.sleep(0.02)
        return started

    yield run
    for process in started:
        process.kill()
        process.wait()


def watch(folder, processes, num_ranks=None, **limits):
    """What the watchdog says once all processes are gone."""
    with Watchdog(folder, num_ranks or len(processes), Limits(**({"step": 1.0, "start": 600.0} | limits))) as watchdog:
        for process in processes:
            assert process.wait() == -signal.SIGKILL
    return watchdog


def test_the_rank_in_no_wait_is_the_one_that_hangs(tmp_path, ranks):
    watchdog = watch(tmp_path, ranks(("wait_for_peers", 3), ("compute", 3)))
    assert watchdog.verdict.startswith("no step ended in 1 s (layout.timeout): rank 0 waits in ")
    assert f"rank 1 hangs in compute ({tmp_path}/rank.py:11)" in watchdog.verdict
    first, _, second = watchdog.stacks.partition("rank 1:")
    assert "in wait_for_peers" in first
    assert first.startswith("rank 0:\n")
    assert "in compute" in second.rpartition("hread 0x")[2]


def test_a_rank_that_does_not_answer_is_the_one_that_hangs(tmp_path, ranks):
    processes = ranks(("compute", 3), ("wait_for_peers", 3), ("compute", 3))
    processes[2].send_signal(signal.SIGSTOP)
    watchdog = watch(tmp_path, processes)
    assert "rank 0 waits in compute" in watchdog.verdict
    assert "rank 2 hangs and does not answer" in watchdog.verdict
    assert "rank 2:\n  (no answer)" in watchdog.stacks


def test_a_rank_that_fell_behind_is_the_one_that_hangs(tmp_path, ranks):
    watchdog = watch(tmp_path, ranks(("compute", 3), ("compute", 2)))
    assert "rank 0 waits in compute" in watchdog.verdict
    assert "rank 1 hangs in compute" in watchdog.verdict


def test_a_start_has_a_limit_of_its_own_and_the_verdict_says_how_far_each_rank_came(tmp_path, ranks):
    """Rank 0 has joined and is in its first step, rank 1 waits for a rank 2 of which there is no sign."""
    processes = ranks(("wait_for_peers", 1), ("wait_for_peers", 0))
    watchdog = watch(tmp_path, processes, num_ranks=3, step=0.1, start=1.0)
    assert watchdog.verdict.startswith("the start came no further in 1 s: rank 0 waits in ")
    assert "; rank 1 waits in " in watchdog.verdict
    assert watchdog.verdict.endswith(", joining the other ranks; rank 2 has not begun")


def test_a_start_is_not_measured_by_the_timeout_of_a_step():
    assert Limits.of(10) == Limits(step=10, start=1800)
    assert Limits.of(7200) == Limits(step=7200, start=7200)
    assert Limits.of(None) == Limits(step=1800, start=1800)


class Clock:
    """In the place of time.monotonic: goes on only when the test says so."""

    def __init__(self):
        self.now, self.reads = 0.0, 0

    def __call__(self):
        self.reads += 1
        return self.now

    def passes(self, seconds):
        """Go on, and wait until the watchdog has looked."""
        self.now += seconds
        seen = self.reads + 2
        while self.reads < seen:
            time.sleep(0.01)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def heartbeats(tmp_path):
    return [WatchedHeartbeat(tmp_path, rank) for rank in (0, 1)]


def test_parts_of_the_start_and_steps_that_end_are_signs_of_life(tmp_path, heartbeats, clock):
    limits = Limits(step=0.5, start=0.5)
    with Watchdog(tmp_path, 2, limits) as watchdog:
        for part in range(8):
            for heartbeat in heartbeats:
                heartbeat.enters(f"part {part}")
            clock.passes(2 * limits.pause)
        for _ in range(8):
            for heartbeat in heartbeats:
                heartbeat.beat()
            clock.passes(2 * limits.pause)
        for heartbeat in heartbeats:
            heartbeat.__exit__()
        for _ in range(8):
            clock.passes(2 * limits.pause)
        assert watchdog.verdict is None


def test_a_job_that_was_suspended_has_not_hung(tmp_path, heartbeats, clock):
    """As `scontrol suspend` does it: nobody runs for hours, and then everybody at once."""
    with Watchdog(tmp_path, 2, Limits(step=600, start=600)) as watchdog:
        for heartbeat in heartbeats:
            heartbeat.beat()
        clock.passes(7200)
        clock.passes(7200)
        assert watchdog.verdict is None


def test_without_a_launcher_a_rank_ends_itself_and_says_where_it_hung():
    script = (
        "import time; from zoo.core.launch.watchdog import Limits, LoneHeartbeat\n"
        "with LoneHeartbeat(3, Limits(0.5, 600)) as heartbeat: heartbeat.beat(); time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 2 in <module>' in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "Error: no step ended in 0.5 s (layout.timeout): rank 3 hangs in <module> (<string>:2). "
        "The same command resumes from the last finished checkpoint"
    )


def test_without_a_launcher_a_rank_ends_even_where_no_thread_of_python_runs():
    # PyDLL holds the interpreter's lock, as a driver that is stuck may.
    script = (
        "import ctypes; from zoo.core.launch.watchdog import Limits, LoneHeartbeat\n"
        "with LoneHeartbeat(0, Limits(0.5, 0.5)): ctypes.PyDLL(None).sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 2 in <module>' in done.stderr


@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 1), ("KeyError", 0)])
def test_a_rank_that_lost_the_others_is_watched_on_its_way_out(error, status):
    way_out = 600 if status else 2  # in seconds, and the limit is half of one
    script = (
        "import time; from zoo.core.launch.watchdog import Limits, LoneHeartbeat\n"
        "try:\n"
        f"    with LoneHeartbeat(0, Limits(0.5, 0.5)): raise {error}\n"
        f"except {error}: time.sleep({way_out})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
