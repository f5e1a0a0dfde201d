"""Starting ranks on this machine, telling them of signals, and saying in one line how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from zoo.core.errors import PluginFailed, SavedOnSignal, ZooError, error_of
from zoo.core.launch import bootstrap
from zoo.core.launch.bootstrap import start_file
from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.rank_processes import RankProcesses
from zoo.core.launch.signals import LAUNCHER, NOTHING_YET, is_warning, say, start_is_over, wishes
from zoo.core.launch.watchdog import Limits, Watchdog, pulses
from zoo.core.machine.device import accelerator_type, num_cores
from zoo.core.machine.launcher_env import STORE_FILE, OuterRank


def inside_launcher() -> bool:
    """Return whether torchrun (or another launcher that sets RANK) started this process. Raise UsageError."""
    return OuterRank.from_environment() is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A program for ranks, and what a user is told of its end before time."""

    target: str
    """`package.module:function`, called on every rank as `function(payload, rank_folder)`."""
    on_signal: str
    """What a first SIGTERM or SIGINT brings about, and a second one."""
    again: str
    """What the same command would do."""
    stopped: str | None = None
    """What is said of ranks that a signal ended before their first step, if that is a good end."""


def launch(
    payload: dict[str, Any],
    num_ranks: int,
    work: Work,
    *,
    max_restarts: int = 0,
    timeout_s: float | None = None,
) -> Any:
    """Run a program on `num_ranks` ranks of this machine until they end; returns the answer a rank left, if any.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on, as a wish to stop; a second SIGTERM or SIGINT aborts. If a rank
    died or hung, all are started again, `max_restarts` times at most; `timeout_s` is that of a step. Raises what the
    ranks raised: a ZooError as it is, anything else as WorkerDied. What a plugin raised is tried again as a death is.
    """
    with _PassedOn(work) as passed_on:
        for restart in range(max_restarts + 1):
            with tempfile.TemporaryDirectory(prefix="zoo-launch-") as folder:
                rank_folder = RankFolder(Path(folder))
                rank_folder.payload.write_text(json.dumps(payload | {"restart": restart}))
                rank_folder.path.write_text(json.dumps([entry for entry in sys.path if isinstance(entry, str)]))
                try:
                    with passed_on.to(rank_folder):
                        _start(rank_folder, num_ranks, work, timeout_s)
                except (WorkerDied, PluginFailed) as died:
                    if restart == max_restarts or passed_on.asked:
                        raise
                    what = died.what if isinstance(died, WorkerDied) else died
                    sys.stderr.write(f"{what}. Restart {restart + 1} of {max_restarts}.\n")
                    continue
                return json.loads(rank_folder.answer.read_text()) if rank_folder.answer.exists() else None
    raise AssertionError("the last try returns or raises")


def _start(rank_folder: RankFolder, num_ranks: int, work: Work, timeout_s: float | None) -> None:
    """One try, from the first process to the end of the last. Raises what the ranks raised."""
    command = [sys.executable, *_interpreter_flags(), _BOOTSTRAP, work.target, str(rank_folder.root)]
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(num_ranks))),
        STORE_FILE: str(rank_folder.root / "store"),
        LAUNCHER: str(os.getpid()),
    }
    watchdog = Watchdog(rank_folder.root, num_ranks, Limits.of(timeout_s))
    with watchdog, RankProcesses(command, num_ranks, environment) as ranks:
        failed = ranks.wait(given_up=lambda: watchdog.verdict is not None)
    if watchdog.verdict:
        sys.stderr.write(watchdog.stacks)
        raise WorkerDied(watchdog.verdict, work)
    if failed:
        raise verdict(rank_folder, failed, work)


class WorkerDied(ZooError):
    """A rank ended without saying why, or hung: killed, out of memory, or an unexpected exception."""

    def __init__(self, what: str, work: Work, hint: str = "") -> None:
        super().__init__(f"{what}. {work.again}{hint}")
        self.what = what
        """Which rank, and of what."""


def verdict(rank_folder: RankFolder, failed: Mapping[int, int], work: Work) -> ZooError:
    """Return the error that started it; `failed` has exit codes of ranks in the order of their ends.

    A rank's own word comes first, then a rank that ended without one, then the earliest exception: what ranks say when
    a peer is gone is no cause.
    """
    said = rank_folder.errors()
    spoken = next((error for error in said if error["zoo"]), None)
    if spoken:
        _show_traceback(spoken)
        return error_of(spoken["kind"], spoken["exit_code"], spoken["message"])
    silent = [(rank, code) for rank, code in failed.items() if rank not in {error["rank"] for error in said}]
    if not silent:
        _show_traceback(said[0])
        return WorkerDied(f"rank {said[0]['rank']} failed: {said[0]['message']}", work, "; ZOO_DEBUG=1 shows where")
    rank, code = silent[0]
    # By its own word, or by the signal itself before it could hear one.
    asked = code == SavedOnSignal.exit_code or (-code in wishes() and rank_folder.stopping.exists())
    if asked and work.stopped:
        return SavedOnSignal(work.stopped)
    return WorkerDied(_end_of(rank_folder, rank, code), work)


def _show_traceback(said: Mapping[str, Any]) -> None:
    """Write where a rank raised its error, for those who debug."""
    if os.environ.get("ZOO_DEBUG"):
        sys.stderr.write(said["traceback"])


def _end_of(rank_folder: RankFolder, rank: int, code: int) -> str:
    """Say how a rank ended that left no word."""
    if code < 0:
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        end = f"was killed by {signal.Signals(-code).name}{hint}"
    elif code == SavedOnSignal.exit_code:
        end = "was ended by a signal"
    else:
        end = f"ended with status {code} before it could say why"
    return f"rank {rank} {end}{_last_words(rank_folder, rank)}"


def _last_words(rank_folder: RankFolder, rank: int) -> str:
    """Quote what a rank that could not start wrote last, and the file and line where Python was."""
    said = start_file(rank_folder.root, rank)
    lines = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
    if not lines:
        return ""
    if os.environ.get("ZOO_DEBUG"):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
    place = next((line.strip() for line in reversed(lines) if line.startswith('  File "')), "")
    return f"; its last words: {lines[-1].strip()}{f' ({place})' if place else ''}"


_BOOTSTRAP = str(Path(bootstrap.__file__))


def _interpreter_flags() -> list[str]:
    """Return this interpreter's own options (-I, -E, -X dev, ...), so that ranks import and warn as it does.

    `-P` comes on top: a rank gets its `sys.path` from the command, and nothing before that from its own directory.
    """
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return flags if sys.flags.safe_path else [*flags, "-P"]


def _threads(num_ranks: int) -> int:
    """Threads a rank may use. Next to an accelerator a few do; on a CPU the ranks share the cores."""
    return 4 if accelerator_type() else max(1, num_cores() // num_ranks)


class _PassedOn:
    """Inside `with`, signals that ask to stop go to the ranks, and Ctrl-Z suspends them too.

    A second SIGTERM or SIGINT ends the ranks and raises KeyboardInterrupt. Python takes handlers on the main thread
    only, so elsewhere nothing is passed on.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._rank_folder: RankFolder | None = None
        self._by_hand = False
        self.asked = False

    def __enter__(self) -> _PassedOn:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in wishes()}
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            start_is_over()
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    @contextlib.contextmanager
    def to(self, rank_folder: RankFolder) -> Iterator[None]:
        """Pass signals on to the ranks of a folder. Raises SavedOnSignal if one came before there were any."""
        self._rank_folder = rank_folder
        try:
            if self.asked:
                raise SavedOnSignal(NOTHING_YET)
            yield
        finally:
            self._rank_folder = None

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        by_hand = not is_warning(number)
        if self._by_hand and by_hand:
            self._send(signal.SIGKILL)
            raise KeyboardInterrupt
        self.asked, self._by_hand = True, self._by_hand or by_hand
        say(f"{signal.Signals(number).name}: {self._answer(by_hand)}.")
        if self._rank_folder is not None:
            self._rank_folder.stopping.touch()
        self._send(signal.SIGTERM)

    def _answer(self, by_hand: bool) -> str:
        """What a signal brings about, and how to abort for those at a keyboard."""
        if self._rank_folder is None or not any(pulse.steps for pulse in pulses(self._rank_folder.root).values()):
            return "ending the start"
        return self._work.on_signal if by_hand else self._work.on_signal.partition(". ")[0]

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Ranks are of another session, which a terminal does not suspend."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._rank_folder is not None:
            self._rank_folder.send(number)
