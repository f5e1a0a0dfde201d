"""Files of a checkpoint directory from elsewhere: opened only where they are plain files inside it.

A link that leads out would publish a stranger's choice of our files; a pipe would hang, a device would never end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo import DataError

_BLOCK = 1 << 20


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor for reading. Raises DataError as `open_file` does."""
    descriptor = open_file(file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(file: Path) -> int:
    """A descriptor for reading a regular file that lies where it says. Raises DataError naming the file and why not."""
    try:
        real = _inside(file)
        _check_regular(file, os.lstat(real).st_mode)
        # Should another take its place meanwhile: a pipe must not hang, a link must not be followed.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{file.parent} has no {file.name}; copy it from where the weights come from") from None
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        _check_regular(file, os.fstat(descriptor).st_mode)
    except DataError:
        os.close(descriptor)
        raise
    return descriptor


def identity(descriptor: int) -> tuple[int, int, int, int]:
    """What changes when a file is replaced, cut or written to: device, inode, size, time of the last change."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_bounded(file: Path, limit: int) -> bytes:
    """All of a file. Raises DataError if it is none, cannot be read or is longer than `limit` bytes."""
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        content = b"".join(_blocks(file, descriptor, limit)) if size <= limit else b""
    if size > limit:
        raise _too_long(file, limit)
    return content


def copy_file(source: Path, target: Path, *, limit: int) -> None:
    """Copy byte for byte into a new file, which is on the disk when this returns.

    Raises DataError if the source is not what `open_file` takes or longer than `limit` bytes, OSError where the
    target exists (a link counts) or the disk does not take it.
    """
    with opened(source) as descriptor:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(target, flags, 0o666), "wb") as copy:
            for block in _blocks(source, descriptor, limit):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())


def _inside(file: Path) -> Path:
    """The file that a name leads to. Links may stay in the directory or, in a snapshot of the hub's cache, lead to its
    blobs: `models--o--n/snapshots/COMMIT/config.json` is a link to `../../blobs/HASH`."""
    root = Path(os.path.realpath(file.parent, strict=True))
    real = Path(os.path.realpath(file, strict=True))
    # A checkpoint may have a folder of chat templates: then the snapshot is one above.
    roots = [root, *(s.parent.parent / "blobs" for s in (root, root.parent) if s.parent.name == "snapshots")]
    if real.parent not in roots:
        raise DataError(f"{file}: a link out of its directory, to {real}, is not followed; put the file itself there")
    return real


def _check_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise DataError(f"{file}: not a regular file; put the file itself there")


def _blocks(file: Path, descriptor: int, limit: int) -> Iterator[bytes]:
    count = 0
    while block := os.read(descriptor, _BLOCK):
        count += len(block)
        if count > limit:
            raise _too_long(file, limit)
        yield block


def _too_long(file: Path, limit: int) -> DataError:
    return DataError(f"{file}: more than the {limit} bytes that are allowed")
