"""What a launcher makes of the ends of its ranks."""

import os
import signal
import sys

import pytest

from zoo.core.errors import (
    DataError,
    LayoutError,
    NumericsError,
    PluginError,
    PluginFailed,
    SavedOnSignal,
    UsageError,
    ZooError,
)
from zoo.core.launch import rank_processes
from zoo.core.launch.bootstrap import start_file
from zoo.core.launch.launcher import WorkerDied, verdict
from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.rank_processes import RankProcesses
from zoo.core.run.worker import TRAINING


@pytest.mark.parametrize("error", [UsageError("a"), NumericsError("b", 3), SavedOnSignal("c"), ZooError("d")])
def test_a_ranks_own_word_is_raised_as_it_is(tmp_path, error):
    rank_folder = RankFolder(tmp_path)
    rank_folder.report(0, RuntimeError("connection closed by peer"))
    rank_folder.report(1, error)
    found = verdict(rank_folder, {0: 1, 1: 1}, TRAINING)
    assert type(found) is type(error)
    assert str(found) == str(error)


def test_a_killed_rank_comes_before_what_its_peers_say_of_it(tmp_path):
    rank_folder = RankFolder(tmp_path)
    rank_folder.report(0, RuntimeError("connection closed by peer"))
    found = verdict(rank_folder, {0: 1, 1: -9}, TRAINING)
    assert isinstance(found, WorkerDied)
    assert found.what == "rank 1 was killed by SIGKILL (often: out of memory)"
    assert str(found).endswith("The same command resumes from the last finished checkpoint")


def test_an_unexpected_exception_is_the_death_of_its_rank(tmp_path):
    rank_folder = RankFolder(tmp_path)
    rank_folder.report(2, KeyError("x"))
    found = verdict(rank_folder, {2: 1}, TRAINING)
    assert found.what == "rank 2 failed: KeyError: 'x'"
    assert "ZOO_DEBUG=1 shows where" in str(found)


def test_a_rank_that_could_not_start_is_quoted_and_its_peers_are_not_blamed(tmp_path):
    rank_folder = RankFolder(tmp_path)
    rank_folder.report(0, RuntimeError("connection closed by peer"))
    rank_folder.check_in(0)
    start_file(tmp_path, 1).write_text('Traceback:\n  File "random.py", line 1, in <module>\nRuntimeError: not yours\n')
    found = verdict(rank_folder, {1: 1, 0: 1}, TRAINING)
    assert found.what == (
        "rank 1 ended with status 1 before it could say why; its last words: RuntimeError: not yours "
        '(File "random.py", line 1, in <module>)'
    )


def test_ranks_that_the_launcher_ends_are_no_cause(monkeypatch):
    monkeypatch.setattr(rank_processes, "_GRACE_S", 0.2)
    script = "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit(3)"
    with RankProcesses([sys.executable, "-c", script], 2, {}) as ranks:
        assert ranks.wait(given_up=lambda: False) == {1: 3}
        left = ranks.pids
    assert not [pid for pid in left if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("code", [75, -signal.SIGTERM, -signal.SIGHUP])
def test_ranks_that_end_by_a_wish_to_stop_in_their_start_are_no_failure(tmp_path, code):
    rank_folder = RankFolder(tmp_path)
    rank_folder.stopping.touch()
    rank_folder.report(0, RuntimeError("connection closed by peer"))
    found = verdict(rank_folder, {1: code, 0: 1}, TRAINING)
    assert type(found) is SavedOnSignal
    assert str(found).startswith("nothing to save yet; the same command starts it")


def test_a_rank_that_somebody_ends_while_nobody_asked_to_stop_was_killed(tmp_path):
    assert verdict(RankFolder(tmp_path), {1: -signal.SIGTERM}, TRAINING).what == "rank 1 was killed by SIGTERM"


def test_a_plugins_own_error_does_not_stand_in_for_one_of_zoo(tmp_path):
    class Mine(DataError):
        """Like those that plugins define."""

    class Odd(ZooError):
        """One with a status that zoo has no error for."""

        exit_code = 42

    for error, kind in ((Mine("a"), DataError), (Odd("a"), ZooError), (DataError("a"), DataError)):
        rank_folder = RankFolder(tmp_path)
        rank_folder.report(0, error)
        found = verdict(rank_folder, {0: 1}, TRAINING)
        assert (type(found), found.exit_code, str(found)) == (kind, error.exit_code, "a")
    assert ZooError.exit_code == 1


@pytest.mark.parametrize("error", [LayoutError("a", "b"), PluginFailed("c"), PluginError("d")])
def test_an_error_comes_back_as_its_own_kind_among_those_of_one_status(tmp_path, error):
    rank_folder = RankFolder(tmp_path)
    rank_folder.report(0, error)
    found = verdict(rank_folder, {0: 1}, TRAINING)
    assert (type(found), str(found)) == (type(error), str(error))
