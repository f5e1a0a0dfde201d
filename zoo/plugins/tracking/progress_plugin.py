"""The progress line: one that refreshes on a terminal, plain lines elsewhere. Rank 0 only, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from shlex import quote
from typing import TYPE_CHECKING

from zoo import hookimpl
from zoo.core.humanize import format_seconds

if TYPE_CHECKING:
    from zoo import RunInfo

ZOO_PLUGIN_API = 1


def line(steps: int, metrics: Mapping[str, float], eta: float) -> str:
    """A step in one line."""
    step = int(metrics["step"])
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        *(_trained(metrics) if "loss" in metrics else ["nothing trained"]),
        f"lr {metrics['lr']:.1e}",
        f"tok/s {metrics['tokens_per_s']:,.0f}",
        *([f"mfu {100 * metrics['mfu']:.1f}%"] if "mfu" in metrics else []),
        f"mem {metrics['mem_peak_gib']:.2f}GiB",
        f"eta {format_seconds(eta)}",
    ]
    return "  ".join(parts)


def _trained(metrics: Mapping[str, float]) -> list[str]:
    return [f"loss {metrics['loss']:.4f}", f"gnorm {metrics['grad_norm']:.2f}"]


class Progress:
    """Prints what happens to a run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first = 0
        self._open_line = False

    @hookimpl
    def zoo_run_start(self, run: RunInfo) -> None:
        self._started, self._first = time.perf_counter(), run.first_step
        if run.first_step:
            self._print(f"resume  from step {run.first_step} of {run.steps}")

    @hookimpl
    def zoo_step_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        elapsed = time.perf_counter() - self._started
        eta = elapsed / max(1, step - self._first) * (run.steps - step)
        text = line(run.steps, metrics, eta)
        if sys.stderr.isatty() and step < run.steps:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
            self._open_line = True
        else:
            self._print(text)

    @hookimpl
    def zoo_checkpoint_saved(self, run: RunInfo, step: int, path: str) -> None:
        self._print(f"saved   step {step} in {path}")

    @hookimpl
    def zoo_run_end(self, run: RunInfo, status: str) -> None:
        if status == "done":
            self._print(f"done    {run.path}\nnext    zoo export {quote(str(run.path))} --to hf")

    @hookimpl
    def zoo_run_error(self, run: RunInfo, error: BaseException) -> None:
        self._print(f"stopped {run.path}: what was saved in it is intact")

    def _print(self, text: str) -> None:
        start = "\r\033[K" if self._open_line else ""
        self._open_line = False
        sys.stderr.write(f"{start}{text}\n")
        sys.stderr.flush()


progress = Progress()
zoo_run_start = progress.zoo_run_start
zoo_step_end = progress.zoo_step_end
zoo_checkpoint_saved = progress.zoo_checkpoint_saved
zoo_run_end = progress.zoo_run_end
zoo_run_error = progress.zoo_run_error
