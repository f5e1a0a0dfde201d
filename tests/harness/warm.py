"""`zoo` commands that share one import of torch: real processes, forked from one that has computed nothing yet.

A command is a process of its own with its own words, environment, streams and signals. So is each rank that it starts:
a child of the command, in a session of its own, which runs what the launcher's command line runs. Only the imports of
libraries are not done again. Tests of the imports themselves start interpreters (`cold=True` in `command.start`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.reduction import DupFd

from zoo.testing import ranks

RANK = "zoo-rank"
"""Name of a process that is a rank, as the kernel has it."""
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_POLL_S = 0.02


class Command:
    """A running command, with what tests use of `subprocess.Popen`."""

    def __init__(self, words, environment, output):
        if output == subprocess.PIPE:
            reads, writes = zip(os.pipe(), os.pipe(), strict=True)
            self.stdout, self.stderr = (os.fdopen(read, "r") for read in reads)
        else:
            self.stdout = self.stderr = None
            writes = [os.dup(output.fileno()), os.dup(output.fileno())]
        context = get_context("forkserver")
        context.set_forkserver_preload(ranks.IMPORTED)
        streams = [DupFd(write) for write in writes]
        self._process = context.Process(target=_be_a_command, args=(words, environment, os.getcwd(), streams))
        self._process.start()
        for write in writes:
            os.close(write)
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("zoo", timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        said = {}
        readers = [
            threading.Thread(target=lambda name=name, stream=stream: said.update({name: stream.read()}), daemon=True)
            for name, stream in (("out", self.stdout), ("err", self.stderr))
        ]
        for reader in readers:
            reader.start()
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("zoo", timeout)
        self.wait(timeout)
        for stream in (self.stdout, self.stderr):
            stream.close()
        return said["out"], said["err"]


def _be_a_command(words, environment, folder, streams):
    """In the new process: what `python -m zoo WORDS` does, and its status."""
    for number, stream in enumerate(streams, start=1):
        fd = stream.detach()
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    _have(environment)
    sys.argv[:] = ["zoo", *words]
    _start_ranks_from(_nursery())
    from zoo.__main__ import main

    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _have(environment):
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=False)


def _nursery():
    """Fork a process that forks ranks on demand, before this one does anything that a rank should not see."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        with contextlib.suppress(EOFError, ConnectionError):
            _fork_ranks(theirs.makefile("rwb"))
        os._exit(0)
    theirs.close()
    return ours.makefile("rwb")


def _fork_ranks(pipe):
    """In the nursery: each rank is forked twice, so that the command that asks for it becomes its parent."""
    command = os.getppid()
    while True:
        words, environment = pickle.load(pipe)
        reads, writes = os.pipe()
        between = os.fork()
        if between == 0:
            rank = os.fork()
            if rank == 0:
                pipe.close()
                while os.getppid() != command:
                    time.sleep(0.001)
                _be_a_rank(words, environment)
            os.write(writes, str(rank).encode())
            os._exit(0)
        os.waitpid(between, 0)
        pipe.write(os.read(reads, 20).ljust(20))
        pipe.flush()
        os.close(reads)
        os.close(writes)


def _be_a_rank(words, environment):
    os.setsid()
    _prctl(_PR_SET_NAME, RANK.encode())
    _have(environment)
    at = next(number for number, word in enumerate(words) if word.endswith("bootstrap.py"))
    sys.argv[:] = words[at:]
    from zoo.core.launch import bootstrap

    bootstrap.main()


class _Rank:
    """In the place of the `subprocess.Popen` of a rank."""

    def __init__(self, nursery, words, environment):
        pickle.dump((words, environment), nursery)
        nursery.flush()
        self.pid = int(nursery.read(20))
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(_POLL_S)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _start_ranks_from(nursery):
    from zoo.core.launch import rank_processes

    class Subprocess:
        """What `rank_processes` uses of the module."""

        @staticmethod
        def Popen(words, *, env, start_new_session):
            assert start_new_session
            return _Rank(nursery, words, env)

    rank_processes.subprocess = Subprocess


def _prctl(option, value):
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
