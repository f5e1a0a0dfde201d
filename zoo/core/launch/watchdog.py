"""Ranks that hang: noticed when no step and no part of the start ends in time, reported with all ranks' stacks."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Self

DEFAULT_TIMEOUT_S = 1800.0
"""Longest that a step with its save may take if `layout.timeout` does not say, and the least that a part of the start
may take whatever it says: imports and weights take as long as a disk and the other jobs of a machine let them."""
RESUMES = "The same command resumes from the last finished checkpoint"
_ANSWER_S = 2.0
_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)')


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds until a rank counts as hung."""

    step: float
    start: float

    @classmethod
    def of(cls, timeout_s: float | None) -> Limits:
        """Return those of a job whose `layout.timeout` is that."""
        step = timeout_s or DEFAULT_TIMEOUT_S
        return cls(step=step, start=max(step, DEFAULT_TIMEOUT_S))

    @property
    def pause(self) -> float:
        """How often to look."""
        return min(0.5, self.step / 10, self.start / 10)

    def passed(self, *, starting: bool) -> str:
        """Say which was passed."""
        if starting:
            return f"the start came no further in {self.start:g} s"
        return f"no step ended in {self.step:g} s (layout.timeout)"


class Ticks:
    """Seconds during which this process ran: a job that was suspended meanwhile has not hung."""

    def __init__(self, pause_s: float) -> None:
        self._most = 2 * pause_s
        self._last = time.monotonic()
        self.now = 0.0

    def tick(self) -> None:
        """Count what passed since the last tick, at most twice what there should be between two."""
        now = time.monotonic()
        self.now += min(now - self._last, self._most)
        self._last = now


class Heartbeat:
    """What a rank beats, inside `with`. This one is of a single process, for which nobody waits."""

    def __enter__(self) -> Self:
        return self

    def expects(self, limits: Limits) -> None:
        """Go by a job's own limits from now on, where this rank watches itself."""

    def enters(self, part: str) -> None:
        """A part of the start begins, named as in `joining the other ranks`."""

    def beat(self) -> None:
        """A step begins; the start, or the step before with its save, has ended."""

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a rank left of itself."""

    beats: int
    part: str
    """Of the start, or empty between the first step and the end."""

    @property
    def steps(self) -> bool:
        return not self.part


NOT_THERE = Pulse(0, "not begun")


class WatchedHeartbeat(Heartbeat):
    """In the folder of zoo's launcher: leaves how often it beat, and the stacks of its threads when sent SIGUSR2."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._pulse = Pulse(0, "")
        self._file = folder / f"{rank}.beat"
        self._stacks = (folder / f"{rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self.enters("importing")

    def enters(self, part: str) -> None:
        self._pulse = Pulse(self._pulse.beats + 1, part)
        fresh = self._file.with_name(f".{self._file.name}")
        with contextlib.suppress(OSError):  # on a full disk the name of the part is lost
            fresh.write_text(part)
        self._leave(fresh)
        fresh.rename(self._file)

    def beat(self) -> None:
        if not self._pulse.steps:
            self.enters("")
            return
        self._pulse = Pulse(self._pulse.beats + 1, "")
        self._leave(self._file)

    def _leave(self, file: Path) -> None:
        """Leave the number of beats as a file's time, which takes it at once and on a full disk."""
        os.utime(file, (self._pulse.beats, self._pulse.beats))

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)


def pulses(folder: Path) -> dict[int, Pulse]:
    """Return what ranks left that have begun and not ended."""
    found = {}
    for path in folder.glob("[0-9]*.beat"):
        with contextlib.suppress(FileNotFoundError):
            part = path.read_text()
            found[int(path.stem)] = Pulse(int(path.stat().st_mtime), part)
    return found


class LoneHeartbeat(Heartbeat):
    """Under another launcher nobody watches a rank but itself: a thread that ends the process, with status 1.

    Before that come its stacks and one line that says what it hangs in or waits for, on stderr. When a run ends because
    ranks lost each other it watches on: threads that wait for those that are gone keep a process from ending.
    """

    def __init__(self, rank: int, limits: Limits) -> None:
        self._rank = rank
        self._limits = limits
        self._part = "starting"
        self._beats = 0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        self.enters(self._part)
        return self

    def expects(self, limits: Limits) -> None:
        self._limits = limits

    def enters(self, part: str) -> None:
        self._part = part
        self._beats += 1
        # For a rank that is stuck where no thread of Python gets its turn.
        faulthandler.dump_traceback_later(self._limit + _ANSWER_S, exit=True)

    def beat(self) -> None:
        self.enters("")

    def __exit__(self, *error: object) -> None:
        if not isinstance(error[1], RuntimeError):
            self._over.set()
            faulthandler.cancel_dump_traceback_later()

    @property
    def _limit(self) -> float:
        return self._limits.start if self._part else self._limits.step

    def _watch(self) -> None:
        clock, beats, since = Ticks(self._limits.pause), 0, 0.0
        while not self._over.wait(self._limits.pause):
            clock.tick()
            if beats != self._beats:
                beats, since = self._beats, clock.now
            if clock.now - since > self._limit:
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
            f"Error: {self._limits.passed(starting=bool(self._part))}: "
            f"rank {self._rank} {does} {_place(stacks)}{_during(self._part)}. {RESUMES}\n"
        )
        sys.stderr.flush()


class Watchdog:
    """The launcher's side, inside `with`: a thread that ends all ranks once one has not beaten for too long.

    `verdict` then says which rank hangs and where the others wait, and `stacks` is what all of them were doing.
    """

    def __init__(self, folder: Path, num_ranks: int, limits: Limits) -> None:
        self._folder = folder
        self._num_ranks = num_ranks
        self._limits = limits
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
        clock = Ticks(self._limits.pause)
        began: set[int] = set()
        since: dict[int, tuple[Pulse, float]] = {}
        while not self._over.wait(self._limits.pause):
            clock.tick()
            there = pulses(self._folder)
            began |= there.keys()
            seen = {rank: NOT_THERE for rank in range(self._num_ranks) if rank not in began} | there
            since = {rank: _kept(since.get(rank), pulse, clock.now) for rank, pulse in seen.items()}
            # A rank in its first step may wait for one that still starts.
            starting = any(not pulse.steps for pulse in seen.values())
            limit = self._limits.start if starting else self._limits.step
            if since and clock.now - min(at for _, at in since.values()) > limit:
                self._report(seen, self._limits.passed(starting=starting))
                _send(self._folder, signal.SIGKILL)
                return

    def _report(self, seen: dict[int, Pulse], passed: str) -> None:
        """Ask every rank for its stacks, and judge by them."""
        _send(self._folder, signal.SIGUSR2)
        files = {rank: self._folder / f"{rank}.stacks" for rank in sorted(seen) if seen[rank] != NOT_THERE}
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not all(file.stat().st_size for file in files.values()):
            time.sleep(0.05)
        time.sleep(0.1)  # a stack that began to come is complete
        said = {rank: file.read_text() for rank, file in files.items()}
        self.stacks = "\n".join(
            f"rank {rank}:\n{_busy_threads(text) or '  (no answer)'}\n" for rank, text in said.items()
        )
        places = {rank: _place(text) for rank, text in said.items()}
        absent = sorted(seen.keys() - said.keys())
        hung = absent or _suspects({rank: seen[rank].beats for rank in said}, said, places)
        where = {
            rank: f"rank {rank} {'hangs' if rank in hung else 'waits'} {place}{_during(seen[rank].part)}"
            for rank, place in places.items()
        } | {rank: f"rank {rank} has not begun" for rank in absent}
        self.verdict = f"{passed}: {'; '.join(where[rank] for rank in sorted(where))}"


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
    """`in all_reduce (zoo/core/launch/signals.py:37)`: the innermost call, and the line that led there."""
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


def _kept(before: tuple[Pulse, float] | None, pulse: Pulse, now: float) -> tuple[Pulse, float]:
    """A pulse, and since when it is that."""
    return before if before is not None and before[0] == pulse else (pulse, now)


def _during(part: str) -> str:
    return f", {part}" if part else ""


def _send(folder: Path, number: signal.Signals) -> None:
    for path in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), number)
