"""A directory that appears whole or not at all, and can be completed after a crash.

It grows as `.OUT.unfinished` beside OUT, with a journal of what is in it, and is renamed at the end. The journal is
locked, so that one process at a time writes there; its first line says of what conversion it is, the others which
blocks are written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo import DataError

JOURNAL = ".journal"

_Key = tuple[str, int]


class Journal:
    """Blocks that were written, by file name and offset."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        lines = _whole_lines(descriptor)
        self.fingerprint = lines[0] if lines else ""
        self.found: set[_Key] = set(filter(None, map(_parsed, lines[1:])))
        self.empty = not self.found

    def start(self, fingerprint: str) -> None:
        """Forget everything: a journal of that conversion, with nothing done."""
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{fingerprint}\n".encode())
        self.fingerprint, self.found, self.empty = fingerprint, set(), True

    def add(self, file: str, offset: int) -> None:
        """Called once the bytes were written. Several threads may call it at once."""
        self.empty = False
        line = f"{offset} {file}\n".encode()
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def unfinished(out: Path, fingerprint: str) -> Iterator[tuple[Path, Journal]]:
    """A directory that becomes `out` when the block ends.

    After a full disk, an interrupt or a kill it stays, and the next conversion of the same fingerprint finds it with
    its journal; another one starts with an empty directory. It vanishes when the block raises DataError, for then the
    next attempt would end the same way.
    """
    out = out.absolute()
    directory = out.with_name(f".{out.name}.unfinished")
    check_target(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory, out) as descriptor:
            journal = Journal(descriptor)
            if journal.fingerprint != fingerprint:
                _clear(directory)
                journal.start(fingerprint)
            yield from _guarded(directory, journal)
            (directory / JOURNAL).unlink()
            sync(directory)
            directory.rename(out)
            sync(out.parent)
    except OSError as error:
        kept = f"what is done is kept in {directory}: type the same command again to complete it, or remove that folder"
        then = (
            kept
            if directory.exists()
            else "nothing was left behind; type the same command again, or choose another OUT"
        )
        raise DataError(f"{error.filename or out} cannot be written: {error.strerror or error}; {then}") from None


def check_target(out: Path) -> None:
    """Raises DataError if something is there that would be overwritten."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} exists and is no directory; choose another OUT")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, and nothing is overwritten; choose another OUT or remove it")


def check_space(directory: Path, size: int) -> None:
    """Raises OSError if the disk cannot take so many bytes, those that are in the directory already included."""
    there = sum(512 * os.stat(file).st_blocks for file in directory.iterdir())
    free = shutil.disk_usage(directory).free
    if size - there > free:
        need = f"{(size - there) / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB free on its disk"
        raise OSError(errno.ENOSPC, need, str(directory.parent))


def sync(path: Path) -> None:
    """Put a file or the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _guarded(directory: Path, journal: Journal) -> Iterator[tuple[Path, Journal]]:
    try:
        yield directory, journal
    except DataError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    except OSError:
        if journal.empty:
            shutil.rmtree(directory, ignore_errors=True)
        raise


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[int]:
    """The journal of a directory, which no other process has. Raises DataError if one has."""
    if directory.is_symlink():
        raise DataError(f"{directory} is a link; remove it")
    directory.mkdir(exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory / JOURNAL, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {out}; wait until it is done, or choose another OUT") from None
        # Whoever had the lock until now may have finished, and the directory be gone.
        check_target(out)
        if not os.path.exists(directory / JOURNAL) or os.fstat(descriptor).st_nlink == 0:
            raise DataError(
                f"another process wrote or gave up {out} meanwhile; look there, then type the command again"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name == JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _whole_lines(descriptor: int) -> list[str]:
    size = os.fstat(descriptor).st_size
    text = os.pread(descriptor, size, 0).decode(errors="replace")
    # What a crash cut off is no line.
    whole = text[: text.rfind("\n") + 1]
    if len(whole.encode()) != size:
        os.ftruncate(descriptor, len(whole.encode()))
    return whole.splitlines()


def _parsed(line: str) -> _Key | None:
    offset, _, file = line.partition(" ")
    return (file, int(offset)) if file and offset.isdecimal() else None
