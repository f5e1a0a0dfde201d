"""A tracker that writes TensorBoard event files beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zoo import UsageError


class TensorBoard:
    """Scalars under `train/`, one event file a run."""

    def __init__(self, run: Path) -> None:
        """Raises UsageError if the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional dependency)
        except ImportError:
            raise UsageError("--track tensorboard needs its package: pip install 'zoo[tensorboard]'") from None
        self._writer = SummaryWriter(run / "tensorboard")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
