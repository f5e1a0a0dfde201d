"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from shlex import quote
from typing import IO

import torch.distributed as dist

from zoo.core.errors import UsageError
from zoo.core.launch.collective import shared


def alone_in(run: Path) -> IO[str]:
    """Lock the run directory against a second process that would write the same checkpoints.

    The lock ends with the file or with the process. Raises UsageError on every rank if somebody holds it.
    """
    file = shared(lambda: _lock_file(run))
    taken = [False]
    if dist.get_rank() == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = [True]
    dist.broadcast_object_list(taken, src=0)
    if taken[0]:
        raise _taken(run)
    return file


def require_free(run: Path) -> None:
    """Raise UsageError if another process trains in a run directory."""
    with contextlib.suppress(OSError), (run / ".lock").open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(run) from None


def _taken(run: Path) -> UsageError:
    return UsageError(f"{run} is being trained by another process; wait for it, or give another --out")


def _lock_file(run: Path) -> IO[str]:
    """Make the run directory and open its lock. Raises UsageError where nothing can be written."""
    checkpoints = run / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (run, checkpoints):
            if os.statvfs(folder).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        lock = run / ".lock"
        # In a copy it may be read-only or somebody else's; it is locked all the same.
        return lock.open("r" if lock.exists() and not os.access(lock, os.W_OK) else "a")
    except OSError as error:
        # No chmod helps where nothing can be written at all.
        mend = "" if error.errno == errno.EROFS else f"make it yours and writable (chmod -R u+w {quote(str(run))}), or "
        raise UsageError(
            f"the run cannot be written: {error.filename}: {error.strerror}; {mend}give another --out"
        ) from None
