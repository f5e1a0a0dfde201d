"""Which signals ask to stop, and what a second one does."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from zoo.core.launch.signals import NOTHING_YET, StopSignals, status_for_launcher, wishes


@pytest.fixture
def hangup():
    """A function that sets how this process takes SIGHUP; undone after the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted_and_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with StopSignals(alone=True) as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
    assert signal.getsignal(number) == before


def test_an_ignored_hangup_stays_ignored(hangup):
    hangup(signal.SIG_IGN)
    assert signal.SIGHUP not in wishes()
    with StopSignals(alone=True) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.asked
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_thought_aborts(first, second):
    with StopSignals(alone=True):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGHUP])
def test_a_warning_is_no_thought_of_anybodys(warning):
    """A shell that goes away sends SIGHUP twice, and a cluster SIGTERM after its warning."""
    with StopSignals(alone=True) as stop:
        for number in (warning, warning, signal.SIGTERM, warning):
            signal.raise_signal(number)
        assert stop.asked


def test_ranks_leave_aborting_to_their_launcher():
    with StopSignals(alone=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked


def test_the_death_of_the_launcher_is_a_wish_whenever_it_came(monkeypatch):
    monkeypatch.setenv("ZOO_LAUNCHER", str(os.getppid()))
    with StopSignals(alone=False) as stop:
        assert not stop.asked
    monkeypatch.setenv("ZOO_LAUNCHER", str(os.getpid()))  # not the parent: it died before this rank could look
    with StopSignals(alone=False) as stop:
        assert stop.asked


def test_off_the_main_thread_handlers_stay_as_they_are():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopSignals(alone=True) as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_signal_is_heard_while_the_main_thread_is_in_c_until_the_start_is_over():
    """A mutex that is taken twice stands for a collective: a call that no signal interrupts, without Python's lock."""
    script = (
        "import ctypes, os, signal, sys; from zoo.core.launch import signals\n"
        "signals.hear_from_the_start(signals.end_at_once)\n"
        "sys.argv[1:] and signals.start_is_over()\n"
        "print('listens', flush=True)\n"
        "lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "(take(lock), take(lock)) if not sys.argv[1:] else sys.stdin.read()\n"
    )
    for words, status, said in (((), 75, f"SIGTERM: {NOTHING_YET}\n"), (("over",), 0, "")):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "listens\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate("")
        assert (process.returncode, err) == (status, said)


@pytest.mark.parametrize(("rank", "status", "ends"), [("", 75, 75), ("3", 75, 0), ("3", 1, 1)])
def test_a_rank_leaves_75_where_its_launcher_cannot_return_it(monkeypatch, tmp_path, rank, status, ends):
    monkeypatch.setenv("ZOO_STATUS_FILE", str(tmp_path / "status"))
    monkeypatch.setenv("RANK", rank)
    assert status_for_launcher(status) == ends
    assert (tmp_path / "status").exists() == (ends == 0)
