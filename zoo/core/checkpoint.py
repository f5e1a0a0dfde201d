"""Training state on disk: torch.distributed.checkpoint in logical tensors, finished or not there at all.

    RUN/checkpoints/step-20/state/       weights and optimizer state, any layout resumes any other
    RUN/checkpoints/step-20/progress.json  step, data cursor
    RUN/checkpoints/step-20/hub/         config.json and tokenizer, as export needs them
    RUN/checkpoints/latest -> step-20    the last finished one

A save is written under a temporary name, synced and renamed; a finished one is never overwritten, and one that has had
its time is renamed before it is deleted. So whatever is named `step-N` is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

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

Answer = TypeVar("Answer")

_FINISHED = re.compile(r"^step-(\d+)$")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class SaveFailed(DataError):
    """A checkpoint could not be written. `what` says which, why, and what is left, without what to type next."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Free some space and type the same command again")
        self.what = what


class Checkpoints:
    """The `checkpoints/` directory of a run."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self.root = run / "checkpoints"
        self.keep = keep

    def save(self, state: TrainState, progress: Mapping[str, Any], hub_files: Mapping[str, bytes]) -> Path:
        """`write` of what is now, in the default group."""
        return self.write(tensors_of(state), state.step, progress, lambda: hub_files)

    def write(
        self,
        tensors: dict[str, Any],
        step: int,
        progress: Mapping[str, Any],
        hub_files: Callable[[], Mapping[str, bytes]],
        group: dist.ProcessGroup | None = None,
    ) -> Path:
        """Write `step-N` and point `latest` at it; collective in `group`, which has all ranks.

        `progress` and `hub_files` are read on rank 0 only. Raises SaveFailed on every rank if a write failed. What was
        saved before stays whatever happens.
        """
        final = self.root / f"step-{step}"
        if _on_rank_zero(final.is_dir, group):
            return final
        unfinished = self.root / f".unfinished-step-{step}"
        try:
            _on_rank_zero(lambda: _make_empty(unfinished), group)
            dcp_save(tensors, checkpoint_id=unfinished / "state", process_group=group)
            _on_rank_zero(lambda: self._finish(unfinished, final, progress, hub_files()), group)
        except CheckpointException as error:
            reason = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        except DataError as error:
            reason = str(error)
        else:
            return final
        raise SaveFailed(_on_rank_zero(lambda: self._give_up(unfinished, reason), group))

    def steps(self) -> list[int]:
        """Steps of the finished saves, ascending."""
        if not self.root.is_dir():
            return []
        found = (_FINISHED.match(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def tidy(self) -> None:
        """Put right what a death in the middle left: `latest` names the last save, and nothing is there by half."""
        with contextlib.suppress(OSError):
            steps = self.steps()
            if steps and self._latest.resolve().name != f"step-{steps[-1]}":
                _prepare_link(self._latest, f"step-{steps[-1]}").replace(self._latest)
        self._sweep()

    @property
    def _latest(self) -> Path:
        return self.root / "latest"

    def _finish(
        self, unfinished: Path, final: Path, progress: Mapping[str, Any], hub_files: Mapping[str, bytes]
    ) -> None:
        _write_synced(unfinished / "progress.json", json.dumps(dict(progress), indent=2).encode())
        for name, content in hub_files.items():
            # A tokenizer may keep some of its templates in a folder of their own.
            (unfinished / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            _write_synced(unfinished / "hub" / name, content)
        _sync_tree(unfinished)
        # Before the renames: all that may find the disk full.
        link = _prepare_link(self._latest, final.name)
        unfinished.rename(final)
        link.replace(self._latest)
        _sync(self.root)
        self._prune()

    def _prune(self) -> None:
        """Delete all but the last `keep`; what cannot be deleted now is swept up later."""
        for step in self.steps()[: -max(1, self.keep)]:
            leaving = self.root / f".unfinished-step-{step}"
            with contextlib.suppress(OSError):
                self.path(step).rename(leaving)
        self._sweep()

    def _sweep(self) -> None:
        for left in self.root.glob(".unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _give_up(self, unfinished: Path, reason: str) -> str:
        """Delete what was written; what to say of it."""
        # What torch says of a short write names no cause, and a full disk is the usual one.
        free = _free_bytes(self.root)
        shutil.rmtree(unfinished, ignore_errors=True)
        why = "the disk is full" if free < 1 << 20 else f"{' '.join(reason.split())} ({free / 2**30:.1f} GiB free)"
        last = max(self.steps(), default=None)
        kept = f"step-{last} is intact" if last is not None else "no earlier checkpoint exists"
        name = unfinished.name.removeprefix(".unfinished-")
        return f"saving {self.root}/{name} failed: {why}. Nothing was lost: {kept}"


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
    tensors = tensors_of(state)
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


def tensors_of(state: TrainState) -> dict[str, Any]:
    """Logical names to tensors: `model.<parameter>`, `optim.state.<parameter>.<slot>`, `optim.param_groups...`."""
    model: nn.Module = state.model
    optimizer = get_optimizer_state_dict(model, state.optimizer, options=_FLAT)
    tensors: dict[str, Any] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optim.{name}": value for name, value in optimizer.items()}


def _on_rank_zero(action: Callable[[], Answer], group: dist.ProcessGroup | None) -> Answer:
    """What an action on rank 0 returns, on every rank, or DataError on every rank if it raised OSError."""
    holder: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            holder[0] = action()
        except OSError as error:
            holder[1] = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    dist.broadcast_object_list(holder, src=0, group=group)
    if holder[1] is not None:
        raise DataError(holder[1])
    answer: Answer = holder[0]
    return answer


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


def _prepare_link(link: Path, target: str) -> Path:
    """A symbolic link to target under another name, from which a rename makes it `link`."""
    fresh = link.with_name(".latest-new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    return fresh


def _free_bytes(path: Path) -> int:
    """What can be written below a directory that may not exist yet."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
