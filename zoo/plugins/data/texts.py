"""Records of a text file: the file itself, or pieces of some megabytes where it is larger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zoo import DataError, Record

PIECE_BYTES = 1 << 22
"""A larger file becomes several records of about this size, cut at the ends of lines: memory stays bounded."""

_SEARCHED_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a text file."""

    path: Path
    start: int
    stop: int
    whole: bool

    def __str__(self) -> str:
        return str(self.path) if self.whole else f"{self.path} bytes {self.start} to {self.stop}"


def read_text(path: Path, start: int, stop: int, offset: int) -> Iterator[tuple[Record, int]]:
    """The one record of bytes `[start, stop)`, both moved to the next end of a line: `{"text": ...}`.

    Its next offset is its end, at which there is nothing more. Raises DataError naming file and byte if it is not
    UTF-8.
    """
    if offset:
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        first, last = _cut(file, start, size), _cut(file, stop, size)
        file.seek(first)
        data = file.read(last - first)
    if data:
        yield Record({"text": _decoded(data, path, first)}, Part(path, first, last, whole=len(data) == size)), last


def _cut(file: BinaryIO, at: int, size: int) -> int:
    """The end of the line that holds a byte; where it is too long, the next beginning of a character."""
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    file.seek(at)
    ahead = file.read(_SEARCHED_BYTES)
    newline = ahead.find(b"\n")
    if newline >= 0:
        return at + newline + 1
    rest = ahead[:4]
    inside = next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))
    return at + inside


def _decoded(data: bytes, path: Path, start: int) -> str:
    try:
        return (data.removeprefix(_BOM) if start == 0 else data).decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start + (len(_BOM) if start == 0 and data.startswith(_BOM) else 0)
        raise DataError(
            f"{path}: byte {at} is not UTF-8 text; convert it (iconv -f latin1 -t utf-8), or leave the file out"
        ) from None
