"""Starting ranks: through torch's elastic launcher, or joining those an outer launcher started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zoo.core.device import accelerator_type, num_cores
from zoo.core.errors import ZooError
from zoo.core.watchdog import RESUMES, Watchdog


def inside_launcher() -> bool:
    """Whether torchrun (or another launcher that sets RANK) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A program for ranks: `python -m MODULE FOLDER`, and what a user is told of its end before time."""

    module: str
    on_signal: str
    """What a first SIGTERM or SIGINT brings about, and a second one."""
    again: str
    """What the same command would do."""


TRAINING = Work(
    module="zoo.core.worker",
    on_signal="finishing the step, then saving. Again aborts without saving",
    again=RESUMES,
)


def launch(
    payload: dict[str, Any],
    num_ranks: int,
    work: Work = TRAINING,
    *,
    max_restarts: int = 0,
    timeout_s: float | None = None,
) -> Any:
    """Run a program on `num_ranks` ranks of this machine until they end; returns the answer a rank left, if any.

    SIGTERM, SIGINT and SIGUSR1 are passed on, as a wish to stop; a second SIGTERM or SIGINT aborts. If a rank died or
    hung, all are started again, `max_restarts` times at most; a rank hangs if it has not beaten for `timeout_s`. Raises
    what the ranks raised: a ZooError as it is, anything else as WorkerDied.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(num_ranks)))
    # Ranks whose peer is gone have nothing to finish, and do not end by a SIGTERM that they take as a wish.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    for restart in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="zoo-launch-") as folder:
            office = Office(Path(folder))
            office.payload.write_text(json.dumps(payload | {"restart": restart}))
            try:
                _start(office, num_ranks, work, timeout_s)
            except WorkerDied as died:
                if restart == max_restarts or office.stopping.exists():
                    raise
                sys.stderr.write(f"{died.what}. Restart {restart + 1} of {max_restarts}.\n")
                continue
            return json.loads(office.answer.read_text()) if office.answer.exists() else None
    raise AssertionError("the last try returns or raises")


def _start(office: Office, num_ranks: int, work: Work, timeout_s: float | None) -> None:
    """One try, from the first process to the end of the last. Raises what the ranks raised."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        # Where it cleans nothing up after itself.
        logs_specs=DefaultLogsSpecs(log_dir=str(office.root / "elastic")),
        # Ours are handled below: the launcher's own handlers would kill the ranks instead of letting them save.
        signals_to_handle="SIGHUP",
    )
    restore = _forward_signals(office, work)
    watchdog = Watchdog(office.root, timeout_s)
    try:
        with watchdog:
            elastic_launch(config, sys.executable)("-m", work.module, str(office.root))
    except ChildFailedError as error:
        if watchdog.verdict:
            sys.stderr.write(watchdog.stacks)
            raise WorkerDied(watchdog.verdict, work) from None
        raise office.verdict(error, work) from None
    finally:
        restore()


def quiet_launcher() -> None:
    """Keep the launcher's own reports of failed ranks off the terminal: `verdict` says it in one line."""
    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class WorkerDied(ZooError):
    """A rank ended without saying why, or hung: killed, out of memory, or an unexpected exception."""

    def __init__(self, what: str, work: Work, hint: str = "") -> None:
        super().__init__(f"{what}. {work.again}{hint}")
        self.what = what
        """Which rank, and of what."""


@dataclass(frozen=True)
class Office:
    """The folder through which a launcher and its ranks talk: the job in, process ids, errors and an answer out."""

    root: Path

    @property
    def payload(self) -> Path:
        return self.root / "job.json"

    @property
    def answer(self) -> Path:
        """JSON that one of the ranks leaves for the launcher to return."""
        return self.root / "answer.json"

    @property
    def stopping(self) -> Path:
        """Exists once ranks were asked to stop."""
        return self.root / "stopping"

    def check_in(self, rank: int) -> None:
        """Leave this rank's process id, so that signals reach it."""
        (self.root / f"{rank}.pid").write_text(str(os.getpid()))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that has checked in and still lives."""
        for text in (path.read_text() for path in self.root.glob("*.pid")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), number)

    def report(self, rank: int, error: BaseException) -> None:
        """Leave an error for the launcher to raise."""
        said = {
            "rank": rank,
            "time": time.time(),
            "zoo": isinstance(error, ZooError),
            "exit_code": getattr(error, "exit_code", 1),
            "message": str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        fresh = self.root / f".{rank}.error"
        fresh.write_text(json.dumps(said))
        fresh.replace(self.root / f"{rank}.error")

    def verdict(self, failure: ChildFailedError, work: Work) -> ZooError:
        """The error that started it: a rank's own word first, then a killed rank, then the earliest exception."""
        said = sorted((json.loads(p.read_text()) for p in self.root.glob("*.error")), key=lambda s: float(s["time"]))
        spoken = next((s for s in said if s["zoo"]), None)
        if spoken:
            kinds = {kind.exit_code: kind for kind in ZooError.__subclasses__() if kind is not WorkerDied}
            return kinds.get(spoken["exit_code"], ZooError)(spoken["message"])
        killed = [(rank, f.exitcode) for rank, f in failure.failures.items() if f.exitcode < 0]
        silent = [(rank, code) for rank, code in killed if not (self.root / f"{rank}.error").exists()]
        if silent:
            rank, code = silent[0]
            name = signal.Signals(-code).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            return WorkerDied(f"rank {rank} was killed by {name}{hint}", work)
        if said:
            if os.environ.get("ZOO_DEBUG"):
                sys.stderr.write(said[0]["traceback"])
            return WorkerDied(f"rank {said[0]['rank']} failed: {said[0]['message']}", work, "; ZOO_DEBUG=1 shows where")
        rank, first = next(iter(failure.failures.items()))
        return WorkerDied(f"rank {rank} ended with status {first.exitcode} before it could say why", work)


def _threads(num_ranks: int) -> int:
    """Threads a rank may use. Next to an accelerator a few do; on a CPU the ranks share the cores."""
    return 4 if accelerator_type() else max(1, num_cores() // num_ranks)


def _forward_signals(office: Office, work: Work) -> Callable[[], None]:
    """Pass signals on to the ranks; a second SIGTERM or SIGINT raises KeyboardInterrupt here, which ends them.

    SIGUSR1 is a cluster's warning, and what follows it no second thought of somebody at a keyboard.
    """
    asked = False

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        warned = number == signal.SIGUSR1
        if asked and not warned:
            office.send(signal.SIGKILL)
            raise KeyboardInterrupt
        asked = asked or not warned
        office.stopping.touch()
        said = work.on_signal.partition(". ")[0] if warned else work.on_signal
        sys.stderr.write(f"{signal.Signals(number).name}: {said}.\n")
        office.send(signal.SIGTERM)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore
