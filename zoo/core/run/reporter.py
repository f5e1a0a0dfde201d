"""What a run tells the world: metrics, observers, trackers, the terminal. Rank 0 speaks, the others do not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.core.contracts.run import RunInfo
from zoo.core.errors import SavedOnSignal
from zoo.core.registry.decisions import Observers
from zoo.core.run.metrics import MetricsFile
from zoo.core.run.trackers import Trackers


class Reporter:
    """Says nothing: the reporter of every rank but the first."""

    def started(self) -> None:
        """The first step comes next."""

    def stepped(self, steps: Sequence[Mapping[str, float | None]]) -> None:
        """Metrics of some steps are known."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is finished."""

    def noted(self, text: str) -> None:
        """A line for whoever watches."""

    def ended(self, error: BaseException | None) -> None:
        """The run is over, by an error or not."""


class FirstRankReporter(Reporter):
    """Writes metrics.jsonl, calls observers and trackers, prints to stderr."""

    def __init__(self, run: RunInfo, *, observers: Observers, trackers: Trackers) -> None:
        self._run = run
        self._observers = observers
        self._trackers = trackers
        self._metrics = MetricsFile(run.path / "metrics.jsonl", first_step=run.first_step + 1)

    def started(self) -> None:
        self._observers.run_start(run=self._run)

    def stepped(self, steps: Sequence[Mapping[str, float | None]]) -> None:
        for metrics in steps:
            self._metrics.write(metrics)
        # A number that a step does not have is null in the file, and nothing to those who take numbers.
        known = [{name: value for name, value in metrics.items() if value is not None} for metrics in steps]
        for metrics in known:
            self._trackers.log(int(metrics["step"]), metrics)
        if known:
            self._observers.step_end(run=self._run, step=int(known[-1]["step"]), metrics=known[-1])

    def saved(self, step: int, path: Path) -> None:
        self._observers.checkpoint_saved(run=self._run, step=step, path=str(path))

    def noted(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def ended(self, error: BaseException | None) -> None:
        self._trackers.close()
        if error is None or isinstance(error, SavedOnSignal):
            self._observers.run_end(run=self._run, status="done" if error is None else "saved")
        else:
            self._observers.run_error(run=self._run, error=error)
