"""The watchdog on small processes: which of them hangs, which wait, what is shown of each, and that all are ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from zoo.core.watchdog import Watchdog

RANK = """
import os, sys, threading, time
from pathlib import Path
from zoo.core.watchdog import WatchedHeart

def wait_for_peers():
    threading.Event().wait()

def compute():
    while True:
        time.sleep(1)

folder, rank, what, beats = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
(folder / f"{rank}.pid").write_text(str(os.getpid()))
threading.Thread(target=compute, daemon=True).start()
with WatchedHeart(folder, rank) as heart:
    for _ in range(beats):
        heart.beat()
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
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.ready"))) < len(parts):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return started

    yield run
    for process in started:
        process.kill()
        process.wait()


def watch(folder, processes, timeout_s=1.0):
    """What the watchdog says once all processes are gone."""
    began = time.monotonic()
    with Watchdog(folder, timeout_s) as watchdog:
        for process in processes:
            assert process.wait(timeout=20) == -signal.SIGKILL
    assert time.monotonic() - began < timeout_s + 6
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


def test_ranks_that_beat_or_have_not_begun_are_left_alone(tmp_path):
    beating = (tmp_path / "0.beat", tmp_path / "1.beat")
    with Watchdog(tmp_path, 0.5) as watchdog:
        time.sleep(0.7)
        for number in range(8):
            for path in beating:
                path.touch()
                os.utime(path, (number, number))
            time.sleep(0.1)
        for path in beating:
            path.unlink()
        time.sleep(0.7)
    assert watchdog.verdict is None


def test_without_a_launcher_a_rank_ends_itself_and_says_where_it_hung():
    script = "import time; from zoo.core.watchdog import LoneHeart\nwith LoneHeart(3, 0.5): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 2 in <module>' in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "Error: no step ended in 0.5 s (layout.timeout): rank 3 hangs in <module> (<string>:2). "
        "The same command resumes from the last finished checkpoint"
    )


def test_without_a_launcher_a_rank_ends_even_where_no_thread_of_python_runs():
    # PyDLL holds the interpreter's lock, as a driver that is stuck may.
    script = (
        "import ctypes; from zoo.core.watchdog import LoneHeart\nwith LoneHeart(0, 0.5): ctypes.PyDLL(None).sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 2 in <module>' in done.stderr


@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 1), ("KeyError", 0)])
def test_a_rank_that_lost_the_others_is_watched_on_its_way_out(error, status):
    script = (
        "import time; from zoo.core.watchdog import LoneHeart\n"
        "try:\n"
        f"    with LoneHeart(0, 0.5): raise {error}\n"
        f"except {error}: time.sleep(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == status, done.stderr
