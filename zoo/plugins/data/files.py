"""A corpus in files: what `--data` means as a path, and records read from any byte on."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zoo import DataError, Record
from zoo.core.errors import did_you_mean
from zoo.plugins.data.lines import read_lines
from zoo.plugins.data.texts import PIECE_BYTES, read_text

LINES = (".jsonl", ".ndjson")
"""One record a line; every other file is text, one record a file."""

REFUSED = {
    ".json": "write one object a line and call it .jsonl",
    ".csv": "write each row as a JSON object on a line of its own and call it .jsonl",
    ".tsv": "write each row as a JSON object on a line of its own and call it .jsonl",
    ".parquet": "write each row as a JSON object on a line of its own and call it .jsonl",
    ".arrow": "write each row as a JSON object on a line of its own and call it .jsonl",
    ".gz": "unpack it",
    ".zst": "unpack it",
    ".bz2": "unpack it",
    ".xz": "unpack it",
    ".zip": "unpack it",
    ".tar": "unpack it",
}
"""Files that hold data in a form that is not read, and what to do about it."""

CHUNK_BYTES = 1 << 16
MAX_SHARDS = 1 << 16
"""Line files are cut into chunks, so that a shuffle of shards mixes a whole file: small, but not too many."""

SAMPLED_BYTES = 1 << 16
"""How much of a file's head and of its tail goes into the fingerprint, besides its name and size."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a corpus, and how errors and shards call it."""

    path: Path
    name: str
    size: int

    @property
    def has_lines(self) -> bool:
        return self.path.suffix.lower() in LINES


@dataclass(frozen=True)
class FileSource:
    """Records of files in a fixed order: a line each of .jsonl, a text of at most some megabytes each of the rest."""

    files: tuple[File, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Number, size and a hash over names, sizes, heads and tails; not where the files lie, nor their dates."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0".encode())
            digest.update(_ends(file))
        total = sum(file.size for file in self.files)
        return f"{len(self.files)} files of {total} bytes, {digest.hexdigest()[:16]}"

    def shards(self) -> Sequence[str]:
        """`name@start` of each chunk of a file."""
        return [f"{file.name}@{start}" for file in self.files for start in range(0, file.size, self._step(file))]

    def read(self, shard: str, offset: int) -> Iterator[tuple[Record, int]]:
        """The records that begin in a chunk. Offsets are bytes of the file. Raises DataError naming file and place."""
        name, _, begin = shard.rpartition("@")
        file, start = self._by_name[name], int(begin)
        stop = min(start + self._step(file), file.size)
        read = read_lines if file.has_lines else read_text
        try:
            yield from read(file.path, start, stop, offset)
        except OSError as error:
            raise DataError(f"{file.path} cannot be read any more: {error.strerror}; put it back") from None

    @cached_property
    def _by_name(self) -> dict[str, File]:
        return {file.name: file for file in self.files}

    @cached_property
    def _chunk_bytes(self) -> int:
        return max(CHUNK_BYTES, sum(file.size for file in self.files if file.has_lines) // MAX_SHARDS)

    def _step(self, file: File) -> int:
        return self._chunk_bytes if file.has_lines else PIECE_BYTES


def open_files(uri: str) -> FileSource:
    """A file, all files below a directory, or those a glob matches (`**` for any depth).

    Hidden files are passed over. A directory that holds .jsonl files is a data set: the other files in it are passed
    over too, and so are files that are not text; a warning counts them. Raises DataError if nothing is there, with
    the nearest name, or if it is in a form that is not read.
    """
    try:
        return _opened(uri)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; --data needs files that can be read") from None


def _opened(uri: str) -> FileSource:
    path = Path(uri).expanduser()
    if path.is_file():
        return FileSource((_file(_accepted(path), path.name),))
    if path.is_dir():
        return _chosen(path, _below(path), uri)
    if any(character in uri for character in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [one for one in found if one.is_file()]
        if not files:
            raise DataError(f"--data {uri} matches no file; put it in quotes, and ** stands for folders of any depth")
        return _chosen(Path(os.path.commonpath([one.parent for one in files])), files, uri)
    raise DataError(_missing(path, uri))


def _chosen(root: Path, paths: Sequence[Path], uri: str) -> FileSource:
    lines = [path for path in paths if path.suffix.lower() in LINES]
    chosen = lines or [_accepted(path, of=uri) for path in paths if path.suffix.lower() in REFUSED or _is_text(path)]
    passed = len(paths) - len(chosen)
    if passed:
        kind = "are not .jsonl, as others there are" if lines else "are not text"
        _log.warning("--data %s: %d files are left out because they %s", uri, passed, kind)
    if not chosen:
        raise DataError(f"--data {uri} has no text in it; give .jsonl or text files")
    return FileSource(tuple(_file(path, path.relative_to(root).as_posix()) for path in chosen))


def _below(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(folder, name) for name in names if not _is_hidden(name)]
    return sorted(path for path in found if path.is_file())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _file(path: Path, name: str) -> File:
    with path.open("rb"):  # what cannot be read is said now, not after hours
        pass
    return File(path, name, path.stat().st_size)


def _accepted(path: Path, *, of: str = "") -> Path:
    """The path, unless its form is refused."""
    advice = REFUSED.get(path.suffix.lower())
    if advice is not None:
        others = f", or choose other files with a glob: --data '{of}/**/*.txt'" if of else ""
        raise DataError(
            f"{path}: {path.suffix} is not read, only .jsonl (one object a line) and text (one sample a file); "
            f"{advice}{others}"
        )
    if not of and path.suffix.lower() not in LINES and not _is_text(path):
        raise DataError(f"{path} is not text; give .jsonl (one object a line) or UTF-8 text (one sample a file)")
    return path


def _is_text(path: Path) -> bool:
    if path.suffix.lower() in LINES:
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _ends(file: File) -> bytes:
    with file.path.open("rb") as opened:
        head = opened.read(SAMPLED_BYTES)
        opened.seek(max(len(head), file.size - SAMPLED_BYTES))
        return head + opened.read(SAMPLED_BYTES)


def _missing(path: Path, uri: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"--data {uri}: there is no directory {folder}; give a file, a directory or a glob"
    near = did_you_mean(path.name, [one.name for one in folder.iterdir()])
    return f"--data {uri} does not exist; {near or 'give a file, a directory or a glob'}"
