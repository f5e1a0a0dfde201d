"""The folder through which a launcher and its ranks talk. Imports no torch, for a rank uses it before it does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.core.errors import ZooError
from zoo.core.launch.bootstrap import PATH_FILE


@dataclass(frozen=True)
class RankFolder:
    """The job in; process ids, errors and an answer out."""

    root: Path

    @property
    def payload(self) -> Path:
        return self.root / "job.json"

    @property
    def path(self) -> Path:
        """JSON: `sys.path` of the launcher, for the ranks to import by."""
        return self.root / PATH_FILE

    @property
    def answer(self) -> Path:
        """JSON that one of the ranks leaves for the launcher to return."""
        return self.root / "answer.json"

    @property
    def stopping(self) -> Path:
        """Exists once ranks were asked to stop; for those that could not hear it yet."""
        return self.root / "stopping"

    def check_in(self, rank: int) -> None:
        """Leave this rank's process id, so that signals reach it."""
        (self.root / f"{rank}.pid").write_text(str(os.getpid()))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that has checked in and still lives."""
        for text in (path.read_text() for path in self.root.glob("*.pid")):
            # One that is just checking in has not written its number yet, and looks for `stopping` next.
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(text), number)

    def report(self, rank: int, error: BaseException) -> None:
        """Leave an error for the launcher to raise."""
        said = {
            "rank": rank,
            "time": time.time(),
            "zoo": isinstance(error, ZooError),
            "kind": type(error).__name__,
            "exit_code": getattr(error, "exit_code", 1),
            "message": str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        fresh = self.root / f".{rank}.error"
        fresh.write_text(json.dumps(said))
        fresh.replace(self.root / f"{rank}.error")

    def errors(self) -> list[dict[str, Any]]:
        """Return what ranks reported, earliest first."""
        said = [json.loads(path.read_text()) for path in self.root.glob("[0-9]*.error")]
        return sorted(said, key=lambda error: float(error["time"]))
