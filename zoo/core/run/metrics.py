"""What is known of each step: read from the device now and then, written to metrics.jsonl for every step.

A step without a trained token has no loss: `loss` and `grad_norm` are null there, and the model reports nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.core.errors import NumericsError
from zoo.core.machine.device import peak_memory_bytes
from zoo.core.run.step import StepResult


@dataclass(slots=True)
class Pending:
    """A step whose loss is still on the device."""

    step: int
    result: StepResult
    trained_tokens: int
    flops_per_token: float
    """Of what the mask leaves visible."""
    data_s: float


@dataclass(slots=True)
class Meter:
    """Collects steps and turns them into metrics, all ranks together, every few steps."""

    seq: int
    global_batch: int
    world_size: int
    peak_tflops: float | None
    device: torch.device
    tokens: int = 0
    """Tokens seen since the run began, resumed ones included."""
    trained: int = 0
    empty_steps: int = 0
    """Steps without a trained token."""
    pending: list[Pending] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def progress(self) -> dict[str, int]:
        """What a checkpoint keeps of the steps so far."""
        return {"tokens": self.tokens, "trained_tokens": self.trained, "empty_steps": self.empty_steps}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on counting; checkpoints of before did not know steps without a trained token."""
        self.tokens, self.trained = progress["tokens"], progress["trained_tokens"]
        self.empty_steps = progress.get("empty_steps", 0)

    def add(self, step: Pending) -> None:
        self.pending.append(step)

    def flush(self) -> list[dict[str, float | None]]:
        """Metrics of the pending steps, the same on every rank. Raises NumericsError at the first that is no number."""
        if not self.pending:
            return []
        losses, norms = self._read("loss"), self._read("grad_norm")
        reports = self._reports()
        memory = torch.tensor([peak_memory_bytes(self.device) / 2**30], dtype=torch.float64, device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        values = zip(self.pending, losses, norms, reports, strict=True)
        # A device runs ahead of the host, so only the time of the whole window is known: it is shared evenly.
        step_s = (time.perf_counter() - self.started) / len(self.pending)
        result = [{**self._metrics(p, loss, norm, step_s, memory.item()), **report} for p, loss, norm, report in values]
        self.pending.clear()
        self.restart_clock()
        return result

    def _read(self, name: str) -> list[float | None]:
        """A 0-dim result of each pending step; parts of a loss are added up over ranks."""
        found: list[Tensor | None] = [getattr(p.result, name) for p in self.pending]
        taken = [value.double() for value in found if value is not None]
        if not taken:
            return [None] * len(found)
        values = torch.stack(taken)
        if name == "loss":
            dist.all_reduce(values)
        read = iter(values.tolist())
        return [None if value is None else next(read) for value in found]

    def _reports(self) -> list[dict[str, float]]:
        """What the model reported in each pending step, summed over ranks; a vector `x` becomes `x.0`, `x.1`, ..."""
        rows = [torch.cat([v.double().flatten() for v in report.values()]) for report in self._given_reports()]
        if not rows:
            return [{} for _ in self.pending]
        names = [
            f"{name}.{i}" if value.ndim else name
            for name, value in self._given_reports()[0].items()
            for i in range(value.numel())
        ]
        parts = torch.stack(rows)
        dist.all_reduce(parts)
        read = iter(parts.tolist())
        return [dict(zip(names, next(read), strict=True)) if p.result.report else {} for p in self.pending]

    def _given_reports(self) -> list[Mapping[str, Tensor]]:
        return [p.result.report for p in self.pending if p.result.report]

    def restart_clock(self) -> None:
        """What was done until now, a save for one, is no step's time."""
        self.started = time.perf_counter()

    def _metrics(
        self, pending: Pending, loss: float | None, norm: float | None, step_s: float, memory: float
    ) -> dict[str, float | None]:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if value is not None and not math.isfinite(value):
                raise NumericsError(f"step {pending.step}: the {what} is {value}", pending.step)
        step_tokens = self.seq * self.global_batch
        self.tokens += step_tokens
        self.trained += pending.trained_tokens
        self.empty_steps += loss is None
        rate = step_tokens / step_s
        flops = rate * pending.flops_per_token if loss is not None else 0.0
        metrics = {
            "step": pending.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": pending.result.lr,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "tokens_per_s": rate,
            "tokens_per_s_per_rank": rate / self.world_size,
            "mem_peak_gib": memory,
            "step_s": step_s,
            "data_s": pending.data_s,
        }
        if self.peak_tflops:
            metrics["mfu"] = flops / (self.peak_tflops * 1e12 * self.world_size)
        return metrics


class MetricsFile:
    """metrics.jsonl: one object a step, at full precision, each step once even over restarts."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Drop what an earlier try wrote from `first_step` on (and a half-written last line), then append."""
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] < first_step]
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(path)
        self._path = path
        self._backlog = ""

    def write(self, metrics: Mapping[str, float | None]) -> None:
        """Append a line. On a full disk it is kept, and written with the next one that can be: no reason to stop."""
        self._backlog += json.dumps(dict(metrics)) + "\n"
        size = self._path.stat().st_size
        try:
            with self._path.open("a") as file:
                file.write(self._backlog)
            self._backlog = ""
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, a half-written last line left out."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text().rpartition("\n")[0].splitlines()
