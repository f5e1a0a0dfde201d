"""Saves beside the steps: what a rank holds is copied to the host, and a thread of its own writes the copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from zoo.core.run.checkpoint import Checkpoints, SaveFailed, tensors_of
from zoo.core.run.step import TrainState

HubFiles = Callable[[], Mapping[str, bytes]]


@dataclass(frozen=True, slots=True)
class Saved:
    """How the save of a step ended, the same on every rank."""

    step: int
    path: Path | None
    failure: SaveFailed | None = None


class Saver:
    """Saves of a run, one at a time, over a process group of their own. Every rank calls the same in the same order.

    The copy is held as long as the saver, to be filled again by the next save: pinned beside an accelerator, and as
    large as what the rank holds of weights and optimizer state.
    """

    def __init__(self, checkpoints: Checkpoints, group: dist.ProcessGroup) -> None:
        """`group` has all ranks, over gloo, and is used by nobody else."""
        self._checkpoints = checkpoints
        self._group = group
        beside = torch.accelerator.is_available()
        # Nothing is shared with another process, and a step that followed would change what a copy still reads.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=beside, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=beside
            )
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._flying: tuple[int, Future[Path]] | None = None

    def start(self, state: TrainState, progress: Mapping[str, Any], hub_files: HubFiles) -> None:
        """Copy the state, and write the copy while the run goes on. The save before has been waited for."""
        assert self._flying is None, "a save in flight is waited for before the next"
        staged = self._stager.stage(tensors_of(state))
        assert isinstance(staged, dict), "staging is not asynchronous"
        write = partial(self._checkpoints.write, staged, state.step, progress, hub_files, self._group)
        self._flying = state.step, self._thread.submit(write)

    def write(self, state: TrainState, progress: Mapping[str, Any], hub_files: HubFiles) -> Saved:
        """Write the state itself, for there is nothing to do beside it. The save before has been waited for."""
        assert self._flying is None, "a save in flight is waited for before the next"
        tensors = tensors_of(state)
        return _ended(
            state.step, lambda: self._checkpoints.write(tensors, state.step, progress, hub_files, self._group)
        )

    def ended(self) -> list[Saved]:
        """The save in flight, if it has ended since; at once. Raises what it raised, if that is no failure to write."""
        return self.wait() if self._flying is not None and self._flying[1].done() else []

    def wait(self) -> list[Saved]:
        """The save in flight, if any, once it has ended."""
        if self._flying is None:
            return []
        (step, future), self._flying = self._flying, None
        return [_ended(step, future.result)]

    def close(self) -> None:
        """Start nothing more. What is being written is not waited for: it may wait for ranks that are gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _ended(step: int, result: Callable[[], Path]) -> Saved:
    try:
        return Saved(step, result())
    except SaveFailed as failure:
        return Saved(step, None, failure)
