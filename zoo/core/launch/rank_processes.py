"""The ranks of one machine as processes.

torch's elastic launcher would do it too, but it looks up the host's name for every event it records, and so does its
TCPStore for every connection. That takes minutes where no name server answers, and a machine that is alone needs no
names. What else it is for is done elsewhere: restarts, signals and errors by `launcher`, hosts that meet by torchrun.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

_POLL_S = 0.05
_GRACE_S = 5.0
"""How long ranks whose peer is gone may take to say so, and to end a write."""


class RankProcesses:
    """Inside `with`, `num_ranks` processes of one command line; none is left behind."""

    def __init__(self, command: Sequence[str], num_ranks: int, environment: Mapping[str, str]) -> None:
        """`environment` is the same for all ranks, on top of this process's own."""
        self._command = command
        self._num_ranks = num_ranks
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RankProcesses:
        try:
            for rank in range(self._num_ranks):
                # Of a session of its own, so that Ctrl-C reaches the launcher only, which passes it on.
                process = subprocess.Popen(self._command, env=self._environment_of(rank), start_new_session=True)
                self._processes.append(process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait(self, given_up: Callable[[], bool]) -> dict[int, int]:
        """Wait for the end of all, or until they are given up.

        Return the exit codes of ranks that failed, in the order of their ends.
        """
        ended: dict[int, int] = {}
        patience = _GRACE_S
        while len(ended) < len(self._processes) and patience > 0 and not given_up():
            time.sleep(_POLL_S)
            for rank, process in enumerate(self._processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = process.returncode
            patience -= _POLL_S if any(ended.values()) else 0
        return {rank: code for rank, code in ended.items() if code}

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _environment_of(self, rank: int) -> dict[str, str]:
        """Return what torchrun would set too, as far as anybody reads it, and what is the same for all ranks."""
        number, count = str(rank), str(self._num_ranks)
        return {
            **os.environ,
            **self._environment,
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
