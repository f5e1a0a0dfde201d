"""What a finished checkpoint of a run is, where one is found, and what is said of one that is damaged.

A folder that has neither progress.json nor checksums is no checkpoint: nothing that a save leaves under the name
`step-N` is without them. One that has either was a checkpoint once; if it is not whole now it is damaged, and is never
passed over in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from zoo.core.errors import DataError, UsageError
from zoo.core.storage.checksums import NAME as CHECKSUMS, Checksums
from zoo.core.storage.companions import companion_names

if TYPE_CHECKING:
    pass

PROGRESS = "progress.json"

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_KEYS = ("tokens", "trained_tokens", "seq", "global_batch", "cursor")
_THREADS = 8


def is_claimed(path: Path) -> bool:
    """Whether a folder is, or was, a finished checkpoint."""
    return any(os.path.lexists(path / name) for name in (PROGRESS, CHECKSUMS))


def flaw(path: Path) -> str | None:
    """Return why a folder is no finished checkpoint, by names and lengths of its files; None if it is one."""
    try:
        checksums = Checksums.read(path)
        step = read_progress(path)["step"]
        named = _step_of(_placed(path))
        if named is not None and step != named:
            return f"{path / PROGRESS} is of step {step}"
        return _flaw_of_an_old_one(path) if checksums is None else checksums.misfit(_read_where_there(path))
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"


def damage(path: Path) -> str | None:
    """Return `flaw`, or else what the checksums find, for which every byte is read; None if it is intact."""
    found = flaw(path)
    checksums = None if found else Checksums.read(path)
    return checksums.changed(threads=_threads()) if checksums is not None else found


def claimed_steps(root: Path) -> list[int]:
    """Return the steps, ascending, of all folders of a run's `checkpoints` that are claimed to be checkpoints."""
    try:
        found = [(_step_of(path), path) for path in root.iterdir()]
    except OSError:
        return []
    return sorted(step for step, path in found if step is not None and is_claimed(path))


def unclaimed(root: Path) -> list[Path]:
    """Return what is named as a checkpoint and never was one."""
    return [path for path in sorted(root.iterdir()) if _step_of(path) is not None and not is_claimed(path)]


def finished_steps(root: Path) -> list[int]:
    """Return the steps, ascending, of the finished checkpoints."""
    return [step for step in claimed_steps(root) if flaw(root / f"step-{step}") is None]


def find(path: Path, *, flag: str = "") -> Path | None:
    """Return the checkpoint that a path means: a run (its last one), or a checkpoint itself; None if there is none.

    Raise UsageError if the path is neither, DataError if that checkpoint is damaged. `flag` is for `damaged`.
    """
    # What an export wrote has checksums too.
    if is_claimed(path) and not (path / "config.json").exists():
        if reason := flaw(path):
            raise damaged(path, reason, flag=flag)
        return path
    if not (path / "checkpoints").is_dir():
        raise UsageError(f"{path} is neither a run nor a checkpoint of one; a run has a folder 'checkpoints'")
    while (found := _last(path / "checkpoints")) is not None and (reason := flaw(found)):
        # One that is gone was deleted meanwhile, by a process that trains here.
        if is_claimed(found):
            raise damaged(found, reason, flag=flag)
    return found


def resume_point(run: Path, resume: str) -> Path | None:
    """Return the checkpoint a run goes on from; `resume` is auto, never, or the path of a run or checkpoint.

    Raise UsageError, or DataError if the checkpoint is damaged. Newer checkpoints of the run may be there if they are
    all damaged.
    """
    root = run / "checkpoints"
    own = claimed_steps(root)
    if resume == "never" and own:
        raise UsageError(f"{run} holds checkpoints and --resume never was given; give another --out")
    if resume == "never" or (resume == "auto" and not own):
        return None
    found = find(run if resume == "auto" else Path(resume), flag="--resume ")
    if found is None:
        raise UsageError(f"--resume {resume}: no finished checkpoint in it")
    step = read_progress(found)["step"]
    for newer in own:
        if newer > step and damage(root / f"step-{newer}") is None:
            raise UsageError(f"--resume {found} is older than step-{newer} in {run}; give another --out to branch off")
    return found


def resume_after_restart(run: Path, resume: str) -> str:
    """Return what `resume` means once ranks were started again: the run's own saves go on, if there are any since."""
    own = claimed_steps(run / "checkpoints")
    if not own or resume == "auto":
        return resume
    if resume == "never":
        return "auto"
    found = find(Path(resume), flag="--resume ")
    return "auto" if found is not None and own[-1] > read_progress(found)["step"] else resume


def is_done(saved: Path | None, run: Path, steps: int) -> bool:
    """Whether a run that would go on from `saved` has been trained and saved to that many steps."""
    own = saved is not None and _placed(saved).parent.resolve() == (run / "checkpoints").resolve()
    return own and saved is not None and int(read_progress(saved)["step"]) >= steps


def read_progress(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself. Raise DataError."""
    file = path / PROGRESS
    try:
        # A pipe in its place must not hang.
        if file.exists() and not file.is_file():
            raise OSError("it is no regular file")
        progress = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
    step = progress.get("step") if isinstance(progress, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise DataError(f"{file} names no step")
    return dict(progress)


def resumable_progress(path: Path) -> dict[str, Any]:
    """Return what a run goes on with. Raise DataError where a part of it is missing."""
    progress = read_progress(path)
    missing = [key for key in _KEYS if key not in progress]
    if missing:
        raise damaged(path, f"{path / PROGRESS} has no '{missing[0]}'", flag="--resume ")
    return progress


def damaged(path: Path, reason: str, *, flag: str = "") -> DataError:
    """Return the error about a damaged checkpoint: what is wrong, and which earlier one is intact (it is read whole).

    `flag` is what stands before its path on the command line.
    """
    root, step = _placed(path).parent, _step_of(_placed(path))
    earlier = [number for number in claimed_steps(root) if step is not None and number < step]
    intact = next((number for number in reversed(earlier) if damage(root / f"step-{number}") is None), None)
    if intact is not None:
        way_on = f"the newest intact checkpoint is step-{intact}: give {flag}{quote(str(root / f'step-{intact}'))}"
    elif flag:
        way_on = "no earlier checkpoint of the run is intact; give another --out to start afresh"
    else:
        way_on = "no earlier checkpoint of the run is intact; copy this one again from where it is"
    return DataError(f"{path} is damaged: {reason}; {way_on}")


def require_intact(checksums: Checksums | None, *, of_run: bool, threads: int | None = None) -> None:
    """Compare the files of an opened checkpoint with their checksums, if it has any. Raise DataError."""
    if checksums is None:
        return
    reason = checksums.changed(threads=threads or _threads())
    if reason is not None:
        raise not_as_written(checksums, reason, of_run=of_run)


def not_as_written(checksums: Checksums, reason: str, *, of_run: bool) -> DataError:
    """Return the error about an opened checkpoint, a run's or a directory, of which a file is not what it was."""
    return damaged(checksums.root, reason) if of_run else changed_directory(checksums.root, reason)


def changed_directory(path: Path, reason: str) -> DataError:
    """Return the error about a directory that an import or export wrote and that is another now."""
    return DataError(
        f"{reason}, so it is not what zoo wrote there; import or export it again, or, if somebody changed it on "
        f"purpose, go on without checksums: rm {quote(str(path / CHECKSUMS))}"
    )


def set_aside(path: Path) -> Path:
    """Give another name to what stands where a checkpoint must; nothing is deleted. Return it. Raise OSError."""
    names = (path.with_name(f"{path.name}.aside{'' if n == 1 else f'-{n}'}") for n in range(1, 1000))
    free = next(name for name in names if not os.path.lexists(name))
    path.rename(free)
    return free


def _flaw_of_an_old_one(path: Path) -> str | None:
    """Return `flaw` of a checkpoint without checksums."""
    state = path / "state"
    if not (state / ".metadata").is_file():
        return f"{state / '.metadata'} is missing"
    return None if any(state.glob("*.distcp")) else f"{state} has no .distcp file"


def _last(root: Path) -> Path | None:
    steps = claimed_steps(root)
    return root / f"step-{steps[-1]}" if steps else None


def _step_of(path: Path) -> int | None:
    """Return the step that a folder's name says; None for another name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _placed(path: Path) -> Path:
    """Return a checkpoint's place in its run: where `latest` leads, but not where a step on another disk does."""
    return path if _step_of(path) is not None else path.resolve()


def _read_where_there(path: Path) -> list[str]:
    """Return names of the files in a checkpoint that are of a kind that is read; what else is there changes nothing."""
    states = [f"state/{file.name}" for file in (path / "state").glob("__*.distcp")]
    with contextlib.suppress(OSError):
        return states + [f"hub/{name}" for name in companion_names(path / "hub")]
    return states


def _threads() -> int:
    return min(_THREADS, len(os.sched_getaffinity(0)))
