"""A wish to stop: SIGTERM, SIGINT, SIGHUP (the terminal is gone) and SIGUSR1 (a cluster's warning).

Until the first step there is nothing to finish: `hear_from_the_start` ends the process. From then on `StopSignals`
notes the wish, and the ranks agree on it after each step. Imports no torch: a start is mostly the import of torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from zoo.core.errors import SavedOnSignal
from zoo.core.machine.launcher_env import said_rank

NOTHING_YET = "nothing to save yet; the same command starts it, from its last checkpoint if there is one"
LAUNCHER = "ZOO_LAUNCHER"
"""Environment variable of a rank: the process id of zoo's launcher, whose death is a wish to stop."""
STATUS_FILE = "ZOO_STATUS_FILE"
"""Environment variable: a file that a rank leaves 75 in, for a launcher that cannot return it."""
STOP_FILE = "ZOO_STOP_FILE"
"""Environment variable: a file that exists once a run was asked to stop, for starts that could not hear it yet."""


def wishes() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop. SIGHUP is one unless the process ignores it, as nohup has it."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *(() if nohup else (signal.SIGHUP,)))


def is_warning(number: int) -> bool:
    """Whether nobody at a keyboard sent a signal: what follows it is no second thought."""
    return number in (signal.SIGUSR1, signal.SIGHUP)


def say(line: str) -> None:
    """Write a line to stderr, past Python's own buffers; nowhere if the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def status_for_launcher(status: int) -> int:
    """Return the status a process is to end with.

    torchrun knows success and failure, and starts what failed again. So a rank that saved on a signal leaves its 75 in
    the file named by ZOO_STATUS_FILE, if any, and succeeds.
    """
    file = os.environ.get(STATUS_FILE)
    if status == SavedOnSignal.exit_code and file and said_rank():
        Path(file).write_text(str(status))
        return 0
    return status


class _Start:
    """The time from a process's first lines to its first step."""

    def __init__(self, end: Callable[[signal.Signals], object]) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._over = False

    def listen(self) -> None:
        """Hear signals on a thread: the main thread may wait in C++ for other ranks, where Python runs no handler."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in wishes():
            signal.signal(number, _left_to_the_thread)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reader,), daemon=True, name="signals").start()

    def over(self) -> None:
        """From now on a signal is somebody else's affair."""
        with self._lock:
            self._over = True

    def _hear(self, reader: int) -> None:
        while number := os.read(reader, 1):
            with self._lock:
                if not self._over and number[0] in wishes():
                    self._end(signal.Signals(number[0]))


_STARTS: list[_Start] = []
"""That of this process, if it is zoo's own."""


def hear_from_the_start(end: Callable[[signal.Signals], object]) -> None:
    """Call `end`, on a thread, with the first signal that comes before `start_is_over`; it ends the process.

    For processes that are zoo's own, in their first lines: a caller's process is not ended.
    """
    _STARTS.append(_Start(end))
    _STARTS[-1].listen()


def start_is_over() -> None:
    """Leave signals to the handlers that are there now: there is something to finish, or somebody to tell."""
    for start in _STARTS:
        start.over()


def end_at_once(number: signal.Signals) -> NoReturn:
    """End a command that has done nothing yet."""
    say(f"{number.name}: {NOTHING_YET}")
    os._exit(status_for_launcher(SavedOnSignal.exit_code))


def _left_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    pass


class StopSignals:
    """Inside `with`, a signal is noted instead of ending the process. The launcher's death is a wish to stop too.

    Python takes handlers on the main thread only, so elsewhere nothing is noted.
    """

    def __init__(self, *, alone: bool) -> None:
        """`alone`: no launcher is there to abort this process at a second SIGTERM or SIGINT."""
        self._alone = alone
        self._asked = self._by_hand = False
        self._parent = int(os.environ.get(LAUNCHER) or os.getppid())

    def __enter__(self) -> StopSignals:
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in (wishes() if main else ())}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked or (not self._alone and os.getppid() != self._parent)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        by_hand = not is_warning(number)
        if self._by_hand and by_hand and self._alone:
            raise KeyboardInterrupt
        self._asked, self._by_hand = True, self._by_hand or by_hand
