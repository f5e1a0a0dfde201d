"""Ranks that hang: noticed when no step ends in time, and reported with the Python stacks of all ranks."""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

DEFAULT_TIMEOUT_S = 1800.0
"""Longest that a step, a save or the start may take if `layout.timeout` does not say."""
MARGIN_S = 30.0
"""How much later torch's own timeouts come, which say less."""
RESUMES = "The same command resumes from the last finished checkpoint"
_ANSWER_S = 2.0
_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)')


class Heart:
    """What a rank beats once a step, inside `with`. This one is of a single process, for which nobody waits."""

    def __enter__(self) -> Self:
        self.beat()
        return self

    def beat(self) -> None:
        """Something ended: the start, a step with its save."""

    def __exit__(self, *_: object) -> None:
        pass


class WatchedHeart(Heart):
    """In the folder of zoo's launcher: leaves how often it beat, and the stacks of its threads when sent SIGUSR2."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._beats = 0
        self._file = folder / f"{rank}.beat"
        self._stacks = (folder / f"{rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def __enter__(self) -> Self:
        fresh = self._file.with_name(f".{self._file.name}")
        fresh.touch()
        os.utime(fresh, (0, 0))
        fresh.rename(self._file)
        return super().__enter__()

    def beat(self) -> None:
        self._beats += 1
        # A file's time takes a number at once and on a full disk.
        os.utime(self._file, (self._beats, self._beats))

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)


class LoneHeart(Heart):
    """Under another launcher nobody watches a rank but itself: a thread that ends the process, with status 1.

    Before that come its stacks and one line that says what it hangs in or waits for, on stderr. When a run ends because
    ranks lost each other it watches on: threads that wait for those that are gone keep a process from ending.
    """

    def __init__(self, rank: int, timeout_s: float | None) -> None:
        self._rank = rank
        self._timeout_s = timeout_s or DEFAULT_TIMEOUT_S
        self._last = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        return super().__enter__()

    def beat(self) -> None:
        self._last = time.monotonic()
        # For a rank that is stuck where no thread of Python gets its turn.
        faulthandler.dump_traceback_later(self._timeout_s + _ANSWER_S, exit=True)

    def __exit__(self, *error: object) -> None:
        if not isinstance(error[1], RuntimeError):
            self._over.set()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(min(0.5, self._timeout_s / 10)):
            if time.monotonic() - self._last > self._timeout_s:
                self._report()
                os._exit(1)

    def _report(self) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        does = "waits" if _waits(stacks) else "hangs"
        sys.stderr.write(
            f"rank {self._rank}:\n{_busy_threads(stacks)}\n"
            f"Error: no step ended in {self._timeout_s:g} s (layout.timeout): "
            f"rank {self._rank} {does} {_place(stacks)}. {RESUMES}\n"
        )
        sys.stderr.flush()


class Watchdog:
    """The launcher's side, inside `with`: a thread that ends all ranks once one has not beaten for too long.

    `verdict` then says which rank hangs and where the others wait, and `stacks` is what all of them were doing.
    """

    def __init__(self, folder: Path, timeout_s: float | None) -> None:
        self._folder = folder
        self._timeout_s = timeout_s or DEFAULT_TIMEOUT_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.verdict: str | None = None
        self.stacks = ""

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(0.5, self._timeout_s / 10)
        since: dict[int, tuple[int, float]] = {}
        while not self._over.wait(pause):
            # By a clock that nobody sets, and that stands still while the machine sleeps.
            now, beats = time.monotonic(), self._beats()
            since = {rank: _kept(since.get(rank), number, now) for rank, number in beats.items()}
            if since and now - min(began for _, began in since.values()) > self._timeout_s:
                self._report(beats)
                _send(self._folder, signal.SIGKILL)
                return

    def _beats(self) -> dict[int, int]:
        """How often each rank beat, of those that began and have not ended."""
        beats = {}
        for path in self._folder.glob("[0-9]*.beat"):
            with contextlib.suppress(FileNotFoundError):
                beats[int(path.stem)] = int(path.stat().st_mtime)
        return beats

    def _report(self, beats: dict[int, int]) -> None:
        """Ask every rank for its stacks, and judge by them."""
        _send(self._folder, signal.SIGUSR2)
        files = {rank: self._folder / f"{rank}.stacks" for rank in sorted(beats)}
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not all(file.stat().st_size for file in files.values()):
            time.sleep(0.05)
        time.sleep(0.1)  # a stack that began to come is complete
        said = {rank: file.read_text() for rank, file in files.items()}
        self.stacks = "\n".join(
            f"rank {rank}:\n{_busy_threads(text) or '  (no answer)'}\n" for rank, text in said.items()
        )
        places = {rank: _place(text) for rank, text in said.items()}
        hung = _suspects(beats, said, places)
        where = "; ".join(
            f"rank {rank} {'hangs' if rank in hung else 'waits'} {place}" for rank, place in places.items()
        )
        self.verdict = f"no step ended in {self._timeout_s:g} s (layout.timeout): {where}"


def _suspects(beats: dict[int, int], said: dict[int, str], places: dict[int, str]) -> list[int]:
    """The ranks for which the others wait: those that do not answer, or fell behind, or are in no collective."""
    silent = [rank for rank in said if not said[rank]]
    behind = [rank for rank in beats if beats[rank] < max(beats.values())]
    busy = [rank for rank, text in said.items() if not _waits(text)]
    return silent or [rank for rank in behind if rank in busy] or busy or behind or list(places)


def _main_thread(stacks: str) -> list[re.Match[str]]:
    """Frames of the thread that steps, innermost first: faulthandler marks it, and puts it last."""
    return list(_FRAME.finditer(stacks.rpartition("hread 0x")[2]))


def _waits(stacks: str) -> bool:
    """Whether a rank is in a call that ends when somebody else does something."""
    frames = _main_thread(stacks)
    if not frames:
        return False
    file = frames[0]["file"]
    line = linecache.getline(file, int(frames[0]["line"]))
    return "/torch/distributed/" in file or file.endswith(("/threading.py", "/queue.py")) or ".wait(" in line


def _place(stacks: str) -> str:
    """`in all_reduce (zoo/core/signals.py:37)`: the innermost call, and the line of zoo or a plugin that led there."""
    frames = _main_thread(stacks)
    if not frames:
        return "and does not answer (stopped, or stuck in the kernel)"
    caller = next((frame for frame in frames if not _is_plumbing(frame["file"])), frames[0])
    file = caller["file"]
    return f"in {frames[0]['name']} ({file[file.rfind('/zoo/') + 1 :]}:{caller['line']})"


def _is_plumbing(file: str) -> bool:
    """Whether a file is torch's or the interpreter's."""
    stdlib = file.startswith(sysconfig.get_path("stdlib")) and "/site-packages/" not in file
    return stdlib or "/torch/" in file or file.startswith("<")


def _busy_threads(stacks: str) -> str:
    """The stacks without those of threads that wait for work."""
    threads = stacks.strip().split("\n\n")
    return "\n\n".join(
        thread for thread in threads if "concurrent/futures/thread.py" not in "".join(thread.split("\n")[1:2])
    )


def _kept(before: tuple[int, float] | None, number: int, now: float) -> tuple[int, float]:
    """A number of beats, and since when it is that."""
    return before if before is not None and before[0] == number else (number, now)


def _send(folder: Path, number: signal.Signals) -> None:
    for path in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), number)
