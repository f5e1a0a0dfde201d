"""Records of a file with one JSON object a line, read from any byte on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zoo import DataError, Record
from zoo.plugins.data.turns import described

MAX_LINE_BYTES = 1 << 28
"""A longer line is taken for a mistake, and is not read into memory."""

_BOM, _GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, by where it begins. Its number is counted when it is asked for."""

    path: Path
    start: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"

    @property
    def number(self) -> int:
        """From 1."""
        count, left = 1, self.start
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                count += block.count(b"\n")
                left -= len(block)
        return count


def read_lines(path: Path, start: int, stop: int, offset: int) -> Iterator[tuple[Record, int]]:
    """Records of the lines that begin in bytes `[start, stop)`, from byte `offset` on (0: from the first of them).

    Each comes with the byte after its line. Blank lines are passed over. Raises DataError as `path:line: reason`.
    """
    with path.open("rb") as file:
        at = offset or _first_line(file, start, stop)
        file.seek(at)
        while at < stop:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            where = Line(path, at)
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; break it into samples")
            at += len(line)
            if not line.isspace():
                yield Record(_fields(line, where), where), at


def _first_line(file: BinaryIO, start: int, stop: int) -> int:
    """Where the first line begins that begins in `[start, stop)`; `stop` if none does."""
    if start == 0:
        return 0
    file.seek(start - 1)
    newline = file.read(stop - start).find(b"\n")
    return stop if newline < 0 else start + newline


def _fields(line: bytes, where: Line) -> dict[str, Any]:
    try:
        value = json.loads(line.removeprefix(_BOM).rstrip().decode("utf-8"), object_pairs_hook=_object)
    except _KeyTwice as error:
        raise DataError(f"{where}: an object has the key {str(error)!r} twice; leave one of them") from None
    except UnicodeDecodeError as error:
        at = where.start + error.start
        reason = _no_lines(line) or f"byte {at} of the file is not UTF-8; save it as UTF-8"
        raise DataError(f"{where}: {reason}") from None
    except json.JSONDecodeError as error:
        reason = _no_lines(line) or f"not JSON at column {error.colno}: {error.msg}; write one JSON object a line"
        raise DataError(f"{where}: {reason}") from None
    except RecursionError:
        raise DataError(f"{where}: brackets are nested too deep; write one flat JSON object a line") from None
    except ValueError:  # of Python's own: an integer of thousands of digits
        raise DataError(f"{where}: a number has too many digits to be read; write it as a string") from None
    if not isinstance(value, dict):
        raise DataError(f'{where}: {described(value)}, not an object; write it as {{"text": ...}}')
    return value


class _KeyTwice(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object. JSON does not say which of two equal keys counts, so there is no right choice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return found


def _no_lines(line: bytes) -> str:
    """Say what bytes that are no JSON are, and what to do about them, if that is known."""
    if line.startswith(_GZIP):
        return "the file is compressed by gzip; unpack it"
    if b"\0" in line:
        return (
            "the line has NUL bytes: if the file is UTF-16, save it as UTF-8 (iconv -f utf-16 -t utf-8); if its "
            "writer was ended early, take the line out"
        )
    return ""
