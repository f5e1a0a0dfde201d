"""Training state on disk: torch.distributed.checkpoint in logical tensors, finished or not there at all.

    RUN/checkpoints/step-20/state/       weights and optimizer state, any layout resumes any other
    RUN/checkpoints/step-20/progress.json  step, data cursor
    RUN/checkpoints/step-20/hub/         config.json and tokenizer, as export needs them
    RUN/checkpoints/latest -> step-20    the last finished one

A save is written under a temporary name, synced and renamed; a finished one is never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from zoo.core.errors import DataError, UsageError
from zoo.core.step import TrainState

_FINISHED = re.compile(r"^step-(\d+)$")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """The `checkpoints/` directory of a run."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self.root = run / "checkpoints"
        self.keep = keep

    def save(self, state: TrainState, progress: Mapping[str, Any], hub_files: Mapping[str, bytes]) -> Path:
        """Write `step-N` and point `latest` at it; collective. Raises DataError on every rank if a write failed.

        `progress` and `hub_files` are read on rank 0 only. What was saved before stays whatever happens.
        """
        final = self.root / f"step-{state.step}"
        if _agreed(final.is_dir()):
            return final
        unfinished = self.root / f".unfinished-step-{state.step}"
        _on_rank_zero(lambda: _make_empty(unfinished), "make", unfinished)
        try:
            dcp_save(_tensors(state), checkpoint_id=unfinished / "state")
        except CheckpointException as error:
            reason = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
            raise self._failed(unfinished, reason) from None
        extra = {"progress.json": json.dumps(dict(progress), indent=2).encode()} if _rank() == 0 else {}
        extra |= {f"hub/{name}": content for name, content in hub_files.items()}

        def finish() -> None:
            for name, content in extra.items():
                _write_synced(unfinished / name, content)
            _sync_tree(unfinished)
            unfinished.rename(final)
            _point(self.root / "latest", final.name)
            _sync(self.root)
            self._prune(final)

        try:
            _on_rank_zero(finish, "finish", unfinished)
        except DataError as error:
            raise self._failed(unfinished, str(error)) from None
        return final

    def steps(self) -> list[int]:
        """Steps of the finished saves, ascending."""
        if not self.root.is_dir():
            return []
        found = (_FINISHED.match(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def _prune(self, newest: Path) -> None:
        """Delete all but the last `keep`, and what unfinished saves left."""
        for step in self.steps()[: -max(1, self.keep)]:
            if self.path(step) != newest:
                shutil.rmtree(self.path(step), ignore_errors=True)
        for left in self.root.glob(".unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _failed(self, unfinished: Path, reason: str) -> DataError:
        if _rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        last = max(self.steps(), default=None)
        kept = f"step-{last} is intact" if last is not None else "no earlier checkpoint exists"
        free = shutil.disk_usage(self.root).free
        # What torch says of a short write names no cause, and a full disk is the usual one.
        why = "the disk is full" if free < 1 << 20 else f"{' '.join(reason.split())} ({free / 2**30:.1f} GiB free)"
        return DataError(
            f"saving {self.root}/{unfinished.name.removeprefix('.unfinished-')} failed: {why}. "
            f"Nothing was lost: {kept}. Free some space and type the same command again"
        )


def find(path: Path) -> Path | None:
    """The finished checkpoint a path means: a run (its last one), or a checkpoint itself; None if there is none.

    Raises UsageError if the path is neither.
    """
    if (path / "progress.json").is_file():
        return path
    if not (path / "checkpoints").is_dir():
        raise UsageError(f"{path} is neither a run nor a checkpoint of one; a run has a folder 'checkpoints'")
    checkpoints = Checkpoints(path, keep=1)
    last = max(checkpoints.steps(), default=None)
    return None if last is None else checkpoints.path(last)


def resume_point(run: Path, resume: str) -> Path | None:
    """The checkpoint a run goes on from: `auto`, `never`, or the path of a run or checkpoint. Raises UsageError."""
    own = Checkpoints(run, keep=1).steps()
    if resume == "auto":
        return Checkpoints(run, keep=1).path(own[-1]) if own else None
    if resume == "never":
        if own:
            raise UsageError(f"{run} holds checkpoints and --resume never was given; give another --out")
        return None
    found = find(Path(resume))
    if found is None:
        raise UsageError(f"--resume {resume}: no finished checkpoint in it")
    if own and own[-1] > read_progress(found)["step"]:
        raise UsageError(f"--resume {found} is older than step-{own[-1]} in {run}; give another --out to branch off")
    return found


def finished(run: Path, steps: int) -> bool:
    """Whether a run has been trained and saved to that many steps."""
    return max(Checkpoints(run, keep=1).steps(), default=0) >= steps


def read_progress(path: Path) -> dict[str, Any]:
    """What a finished checkpoint says of itself. Raises DataError."""
    try:
        progress = json.loads((path / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'progress.json'} cannot be read: {error}") from None
    if not isinstance(progress, dict):
        raise DataError(f"{path / 'progress.json'}: expected an object")
    return progress


def load(state: TrainState, path: Path) -> None:
    """Fill weights, optimizer state and step in place, whatever layout wrote them; collective. Raises DataError."""
    tensors = _tensors(state)
    try:
        dcp_load(tensors, checkpoint_id=path / "state")
    except (CheckpointException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path} cannot be resumed from: {reason}. It was saved for another model, or is damaged; "
            f"--resume never --out elsewhere starts afresh"
        ) from None
    optimizer = {k.removeprefix("optim."): v for k, v in tensors.items() if k.startswith("optim.")}
    set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=_FLAT)
    state.step = int(read_progress(path)["step"])


def _tensors(state: TrainState) -> dict[str, Any]:
    """Logical names to tensors: `model.<parameter>`, `optim.state.<parameter>.<slot>`, `optim.param_groups...`."""
    model: nn.Module = state.model
    optimizer = get_optimizer_state_dict(model, state.optimizer, options=_FLAT)
    tensors: dict[str, Any] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optim.{name}": value for name, value in optimizer.items()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _agreed(value: bool) -> bool:
    """Rank 0's answer, on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _on_rank_zero(action: Any, verb: str, path: Path) -> None:
    """Run on rank 0; every rank returns together or raises DataError together."""
    failure: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            failure[0] = f"cannot {verb} {path.name}: {error.strerror or error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise DataError(failure[0])


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for entry in (path, *path.rglob("*")):
        _sync(entry)


def _point(link: Path, target: str) -> None:
    """Make a symbolic link point at target, atomically."""
    fresh = link.with_name(".latest-new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
