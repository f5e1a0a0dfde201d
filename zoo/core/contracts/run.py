"""Contracts of who watches a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Observers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run, as observers see it. Rank 0 only."""

    path: Path
    model: str
    size: str
    steps: int
    first_step: int
    world_size: int
    config: Mapping[str, Any]
    """The resolved job."""


class Tracker(Protocol):
    """A metrics sink."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step; `loss` and `grad_norm` are not among them if no token of it was trained."""

    def close(self) -> None: ...
