"""Runs that are killed, stopped, or out of disk: nothing finished is lost and the same command goes on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time

import pytest

from tests.harness.command import start, train, zoo
from tests.harness.warm import RANK
from tools import kill_ranks
from zoo.core.launch.watchdog import pulses
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

JOB = ("llama3", "--seq", "256", "--cp", "2", "--steps", "40", "--save-every", "1")
PATIENCE_S = 900
"""Until a test gives up, on a machine that does other things too. Nothing is asserted of how long things take."""


def losses(rows):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory):
    """Saves are waited for here, and in the runs compared with it they are written beside the steps."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, *JOB, "--set", "checkpoint.async=false")
    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    return losses(read_metrics(undisturbed_run / "metrics.jsonl"))


@pytest.mark.dist
@pytest.mark.slow
def test_killed_ranks_are_started_again_and_every_number_is_as_if_nothing_had_been(undisturbed_run, tmp_path):
    """A short run of tools/kill_ranks.py."""
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    hunted = kill_ranks.hunt(JOB, run, 3, seed=1, TMPDIR=str(temporary))
    assert hunted.status == 0, hunted.said
    # A fast machine may be done before its last ranks could be killed.
    assert len(hunted.kills) == hunted.said.count(" was killed by SIGKILL") == hunted.said.count(". Restart ")
    assert hunted.kills
    assert "Traceback" not in hunted.said
    assert kill_ranks.differences(undisturbed_run, run) == []
    assert list(temporary.glob("zoo-*")) == []


@pytest.mark.dist
def test_a_signal_saves_and_the_same_command_goes_on(undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start("finetune", *JOB, "--out", run)
    wait_for_workers(process, run, 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert "the same command goes on" in err
    saved = Checkpoints(run, keep=1).steps()
    assert saved[-1] == len(read_metrics(run / "metrics.jsonl"))
    _, err = zoo("finetune", *JOB, "--out", run)
    assert f"from step {saved[-1]} of 40" in err
    assert losses(read_metrics(run / "metrics.jsonl")) == undisturbed
    _, err = zoo("finetune", *JOB, "--out", run)
    assert "all 40 steps already" in err


@pytest.mark.dist
def test_a_killed_rank_is_started_again_and_a_warning_of_the_cluster_saves(undisturbed, tmp_path):
    run = tmp_path / "run"
    # Ranks that are started again go on from what they saved, whatever the first ones were told to resume from.
    process = start("finetune", *JOB, "--out", run, "--max-restarts", "1", "--resume", "never")
    victim = wait_for_workers(process, run, 0)[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{victim}"))
    died_after = max(Checkpoints(run, keep=1).steps())
    wait_for_workers(process, run, died_after)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert "was killed by SIGKILL (often: out of memory). Restart 1 of 1." in err
    assert "SIGUSR1: finishing the step, then saving" in err
    assert "Traceback" not in err
    found = losses(read_metrics(run / "metrics.jsonl"))
    assert len(found) == max(Checkpoints(run, keep=1).steps())
    assert found == undisturbed[: len(found)]


def test_a_run_of_one_process_is_started_again_too(tmp_path):
    plugin = tmp_path / "dies.py"
    plugin.write_text(
        "import os, signal, zoo\n"
        "@zoo.hookimpl\n"
        "def zoo_step_end(run, step, metrics):\n"
        "    if step == 2 and not (run.path / 'died').exists():\n"
        "        (run.path / 'died').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    job = ("llama3", "--seq", "64", "--steps", "3", "--save-every", "1", "--set", "checkpoint.async=false")
    _, err = zoo("--plugin", plugin, "finetune", *job, "--max-restarts", "1", "--out", tmp_path / "run")
    assert "rank 0 was killed by SIGKILL (often: out of memory). Restart 1 of 1." in err
    assert "from step 1 of 3" in err
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.dist
def test_a_rank_that_hangs_is_named(tmp_path):
    run = tmp_path / "run"
    process = start("finetune", *JOB, "--steps", "4000", "--out", run, "--set", "layout.timeout=10")
    ranks = wait_for_workers(process, run, 0)
    os.kill(ranks[0], signal.SIGSTOP)
    _, err = process.communicate()
    assert process.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "no step ended in 10 s (layout.timeout)" in error
    hung, waiting = (0, 1) if "rank 0 hangs" in error else (1, 0)
    assert f"rank {hung} hangs and does not answer" in error
    assert f"rank {waiting} waits in " in error
    assert "zoo/core/run/train.py" in err.partition(f"rank {waiting}:")[2]
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]


@pytest.mark.dist
def test_a_second_signal_aborts_at_once_and_leaves_no_rank_behind(tmp_path):
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    job = ("finetune", "llama3", "--seq", "16k", "--cp", "2", "--steps", "99", "--out", run)
    process = start(*job, TMPDIR=str(temporary))
    wait_until(lambda: [pulse.steps for root in temporary.iterdir() for pulse in pulses(root).values()] == [True, True])
    ranks = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert any("SIGINT: finishing the step" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert Checkpoints(run, keep=1).steps() == []
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]


@pytest.mark.dist
def test_a_disk_that_takes_no_more_loses_nothing(tmp_path):
    run = tmp_path / "run"
    job = ("finetune", "llama3", "--seq", "256", "--save-every", "1", "--out", run)
    zoo(*job, "--steps", "2")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        _, err = zoo(*job, "--steps", "4", status=5, cold=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The run goes on" in err  # step 3 was not the last
    assert "step-2 is intact" in err
    assert "Traceback" not in err
    assert Checkpoints(run, keep=1).steps() == [1, 2]
    _, err = zoo(*job, "--steps", "4")
    assert "from step 2 of 4" in err


@pytest.fixture
def small_disk(tmp_path):
    """A directory that is a file system of its own, with room for one checkpoint, and a function that enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)

    try:
        mounted = mount("-t", "tmpfs", "-o", "size=10m", "tmpfs")
    except FileNotFoundError as error:
        pytest.skip(f"no mount here: {error}")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder, lambda: mount("-o", "remount,size=64m")
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.dist
def test_a_full_disk_is_a_warning_until_there_is_room_again(small_disk, tmp_path):
    """A save takes 6.7 MB of the 10 MB there are, so that the first is written and no other."""
    run, enlarge = small_disk
    with (tmp_path / "said").open("w+") as said:
        process = start("finetune", *JOB[:-3], "4000", "--save-every", "1", "--out", run, output=said)
        warned = (
            f"warning: saving {run}/checkpoints/step-2 failed: the disk is full. Nothing was lost: step-1 is intact"
        )
        wait_until(lambda: (tmp_path / "said").read_text().count("The run goes on") >= 3, process)
        assert Checkpoints(run, keep=1).steps() == [1]
        assert (run / "checkpoints" / "latest").resolve().name == "step-1"
        enlarge()
        wait_until(lambda: len(Checkpoints(run, keep=1).steps()) == 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
        text = (tmp_path / "said").read_text()
    assert warned in text
    assert "Traceback" not in text
    last = Checkpoints(run, keep=1).steps()[-1]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, last + 1))
    assert list((run / "checkpoints").glob(".*")) == []


@pytest.mark.dist
def test_a_loss_that_is_no_number_names_its_module_and_spoils_nothing(tmp_path):
    run = tmp_path / "run"
    _, err = zoo("finetune", *JOB, "--lr", "1e10", "--out", run, status=6)
    # Weights of 1e10 make queries and keys of 1e21, finite in fp32; their products are the first that are not.
    error = err.splitlines()[-1]
    assert error.startswith(
        "Error: step 2: the loss is nan; it first appeared in the output of model.layers.0.self_attn."
    )
    assert error.endswith("step-1 is intact")
    assert "Traceback" not in err
    assert Checkpoints(run, keep=1).steps() == [1]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1]


@pytest.mark.dist
def test_one_run_directory_takes_one_process_at_a_time(tmp_path):
    run = tmp_path / "run"
    job = ("finetune", "llama3", "--seq", "256", "--steps", "2000", "--out", run)
    first = start(*job, "--save-every", "1")
    wait_for_workers(first, run, 0)
    _, err = zoo(*job, "--resume", "auto", status=2)
    assert "being trained by another process" in err
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate()
    assert first.returncode == 75, err


def wait_for_workers(process, run, already):
    """Process ids of the ranks, once the run got further than where it began."""
    deadline = time.monotonic() + PATIENCE_S
    while max(Checkpoints(run, keep=1).steps(), default=0) <= already:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.02)
    return [int(pid) for pid in children(process.pid)]


def wait_until(holds, process=None):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def wait_for_a_save(run):
    """Return in the middle of the next save."""
    deadline = time.monotonic() + 10
    while not list((run / "checkpoints").glob(".unfinished-*/state/*")) and time.monotonic() < deadline:
        time.sleep(0.001)


def children(pid, word="zoo.core.run.worker"):
    """Worker processes below a launcher: those with that word in their command line, or named as ranks."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as command:
                    head, _, tail = stat.read().rpartition(")")
                    parent, name, line = int(tail.split()[1]), head.partition("(")[2], command.read()
            except (OSError, ValueError, IndexError):
                continue
            if parent == pid and (word in line or name == RANK):
                found.append(entry)
    return found
