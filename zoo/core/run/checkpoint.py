"""Training state on disk: torch.distributed.checkpoint in logical tensors, finished or not there at all.

    RUN/checkpoints/step-20/state/       weights and optimizer state, any layout resumes any other
    RUN/checkpoints/step-20/progress.json  step, data cursor
    RUN/checkpoints/step-20/hub/         config.json and tokenizer, as export needs them
    RUN/checkpoints/step-20/zoo-checksums.txt  of all other files, written last
    RUN/checkpoints/latest -> step-20    the last finished one, for people: nothing here reads it

A save is written under a temporary name, synced and renamed; a finished one is never overwritten, and one that has had
its time is renamed before it is deleted. Whether a folder `step-N` is a finished one, zoo.core.storage.finished says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from zoo.core.errors import DataError, one_line
from zoo.core.launch.collective import gathered_on_rank_zero, on_rank_zero
from zoo.core.run.step import TrainState
from zoo.core.run.verify import check_among_ranks
from zoo.core.storage.checksums import NAME as CHECKSUMS, Checksums, Sum, SummingStream, sum_of
from zoo.core.storage.finished import PROGRESS, claimed_steps, finished_steps, flaw, read_progress, set_aside, unclaimed

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class SaveFailed(DataError):
    """A checkpoint could not be written. `what` says which, why, and what is left, without what to type next."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Free some space and type the same command again")
        self.what = what


class Checkpoints:
    """The `checkpoints/` directory of a run."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self.run = run
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
        """Write `step-N` with its checksums and point `latest` at it; collective in `group`, which has all ranks.

        `progress` and `hub_files` are read on rank 0 only. Raises SaveFailed on every rank if a write failed. What was
        saved before stays whatever happens.
        """
        final = self.root / f"step-{step}"
        if on_rank_zero(lambda: flaw(final) is None, group):
            return final
        unfinished = self.root / f".unfinished-step-{step}"
        try:
            on_rank_zero(lambda: _make_empty(unfinished), group)
            sums = _save_state(tensors, unfinished / "state", group)
            on_rank_zero(lambda: self._finish(unfinished, final, progress, hub_files(), sums), group)
        except CheckpointException as error:
            reason = _reason(error)
        except DataError as error:
            reason = str(error)
        else:
            return final
        raise SaveFailed(on_rank_zero(lambda: self._give_up(unfinished, reason), group))

    def steps(self) -> list[int]:
        """Return the steps of the finished saves, ascending."""
        return finished_steps(self.root)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def tidy(self) -> list[str]:
        """Repair `latest` and delete partial saves after a crash or a copy. Return lines about what was renamed."""
        with contextlib.suppress(OSError):
            notes = self._clear_latest()
            steps = self.steps()
            if steps and self._latest.resolve().name != f"step-{steps[-1]}":
                self._link(self.path(steps[-1]))
            self._sweep()
            return notes + [f"{path} is no checkpoint, for it has no {PROGRESS}" for path in unclaimed(self.root)]
        return []

    def make_way(self, step: int) -> list[str]:
        """Rename checkpoints after a step, which are damaged if a run resumes there. Return lines about it."""
        newer = [self.path(number) for number in claimed_steps(self.root) if number > step]
        return [f"{path} is damaged and is now {set_aside(path).name}; remove it when you like" for path in newer]

    @property
    def _latest(self) -> Path:
        return self.root / "latest"

    def _finish(
        self,
        unfinished: Path,
        final: Path,
        progress: Mapping[str, Any],
        hub_files: Mapping[str, bytes],
        sums: Mapping[str, Sum],
    ) -> None:
        others = {PROGRESS: json.dumps(dict(progress), indent=2).encode()}
        others |= {f"hub/{name}": content for name, content in hub_files.items()}
        for name, content in others.items():
            _write_synced(unfinished / name, content)
        known = {f"state/{name}": total for name, total in sums.items()}
        Checksums(unfinished, known | {name: sum_of(content) for name, content in others.items()}).write()
        _sync_tree(unfinished)
        # Before the renames: all that may find the disk full.
        link = self._fresh_link(final)
        self._clear_latest()
        if os.path.lexists(final):
            set_aside(final)
        unfinished.rename(final)
        if link is not None:
            link.replace(self._latest)
        _sync(self.root)
        self._prune()

    def _clear_latest(self) -> list[str]:
        """Rename a `latest` that is no link: a copy of the run that followed links made a folder of it."""
        if self._latest.is_symlink() or not os.path.lexists(self._latest):
            return []
        return [
            f"{self._latest} was no link and is now {set_aside(self._latest).name}; remove it if it is a copy of the "
            f"last checkpoint"
        ]

    def _fresh_link(self, target: Path) -> Path | None:
        """A link to target under another name, from which a rename makes it `latest`; None where links cannot be."""
        fresh = self._latest.with_name(".latest-new")
        _remove(fresh)
        try:
            fresh.symlink_to(target.name)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return None
            raise
        return fresh

    def _link(self, target: Path) -> None:
        if link := self._fresh_link(target):
            link.replace(self._latest)

    def _prune(self) -> None:
        """Delete all but the last `keep`; what cannot be deleted now is swept up later."""
        for step in self.steps()[: -max(1, self.keep)]:
            leaving = self.root / f".unfinished-step-{step}"
            with contextlib.suppress(OSError):
                self.path(step).rename(leaving)
        self._sweep()

    def _sweep(self) -> None:
        for left in self.root.glob(".unfinished-*"):
            _remove(left)

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


def load(state: TrainState, path: Path) -> None:
    """Fill weights, optimizer state and step in place, whatever layout wrote them; collective. Raises DataError.

    The optimizer keeps the settings it was built with: those in the checkpoint are of the command that saved it.
    The checkpoint is read whole and compared with its checksums before anything is filled.
    """
    check_among_ranks(path)
    tensors = tensors_of(state)
    settings = {name: value for name, value in tensors.items() if name.startswith("optim.param_groups.")}
    tensors = {name: value for name, value in tensors.items() if name not in settings}
    names = gathered_on_rank_zero([name for name in tensors if name.startswith("model.")])
    on_rank_zero(lambda: _check_metadata(path, set().union(*names)))
    try:
        dcp_load(tensors, checkpoint_id=path / "state")
    except CheckpointException as error:
        raise _unloadable(path, _reason(error)) from None
    optimizer = {k.removeprefix("optim."): v for k, v in (settings | tensors).items() if k.startswith("optim.")}
    set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=_FLAT)
    state.step = int(read_progress(path)["step"])


def tensors_of(state: TrainState) -> dict[str, Any]:
    """Logical names to tensors: `model.<parameter>`, `optim.state.<parameter>.<slot>`, `optim.param_groups...`."""
    model: nn.Module = state.model
    optimizer = get_optimizer_state_dict(model, state.optimizer, options=_FLAT)
    tensors: dict[str, Any] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optim.{name}": value for name, value in optimizer.items()}


def _save_state(tensors: dict[str, Any], path: Path, group: dist.ProcessGroup | None) -> dict[str, Sum]:
    """Write tensors and return, on rank 0, sums of the files of all ranks by name; collective."""
    files = _SummingFiles()
    writer = FileSystemWriter(path)
    writer.fs = files
    dcp_save(tensors, storage_writer=writer, process_group=group)
    return {name: total for sums in gathered_on_rank_zero(files.sums, group) for name, total in sums.items()}


class _SummingFiles(FileSystem):
    """The files that torch writes on this rank; each is summed while it is written."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        with super().create_stream(path, mode) as file:
            stream = SummingStream(cast(IO[bytes], file))
            yield cast(IO[bytes], stream)
        self.sums[Path(path).name] = stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


def _check_metadata(path: Path, names: set[str]) -> None:
    """Raise DataError if the metadata of a state cannot be read, or has weights that are not among the model's names.

    torch would tell the first in many lines, and leave such weights out in silence.
    """
    try:
        found = FileSystemReader(path / "state").read_metadata().state_dict_metadata
    except Exception as error:
        raise _unloadable(path, f"{path / 'state' / '.metadata'}: {one_line(error)}") from None
    left = next((name for name in sorted(found) if name.startswith("model.") and name not in names), None)
    if left is not None:
        raise _unloadable(path, f"it has {left.removeprefix('model.')}, and the model of this job has not")


def _unloadable(path: Path, reason: str) -> DataError:
    """The error about a state that torch does not load although nothing is known to be wrong with its files."""
    if (path / CHECKSUMS).exists():
        return DataError(f"{path} cannot be resumed from: {reason}. It was saved for another model; give another --out")
    away = shlex.join(["mv", str(path), f"{path}.aside"])
    return DataError(
        f"{path} cannot be resumed from: {reason}. It was saved for another model, or is damaged, for it has no "
        f"checksums; {away} goes back to the checkpoint before it, another --out starts afresh"
    )


def _reason(error: CheckpointException) -> str:
    """What was wrong on ranks, each thing once, in a line."""
    reasons = sorted({str(failure[0]) for failure in error.failures.values()})
    return " ".join("; ".join(reasons).split())[:300]


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


def _remove(path: Path) -> None:
    """Delete a link, a file or a folder, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        # What is left may be a copy of what was read-only.
        for folder, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _free_bytes(path: Path) -> int:
    """What can be written below a directory that may not exist yet."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
