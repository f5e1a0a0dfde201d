"""Checksums of the files of a directory, in one text file beside them:

    zoo checksums 1
    cbf43926 9 progress.json
    8587d865 4194304 state/__0_0.distcp
    5a3c6e1f end

CRC-32, length and name of each file; the last line is the CRC-32 of the lines above it. It is read as if a stranger had
written it. Files are summed in pieces, by any number of threads and ranks: sums of pieces combine into that of a file.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from zoo.core.errors import DataError

NAME = "zoo-checksums.txt"

_TITLE = "zoo checksums 1"
_LINE = re.compile(r"([0-9a-f]{8}) (0|[1-9][0-9]{0,17}) (.+)")
_MAX_BYTES = 16 << 20  # some 200,000 files
_MAX_NAME = 1024
_PIECE = 32 << 20
# Fits the processor's cache, so that summing does not read memory a second time.
_BLOCK = 1 << 20
_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reversed: the highest bit is the coefficient of x^0


class Sum(NamedTuple):
    """What a file is known by."""

    crc: int
    length: int

    def __add__(self, following: object) -> Sum:
        """Return the sum of a file in which `following` comes after this part."""
        if not isinstance(following, Sum):
            return NotImplemented
        crc = _times(_shift(following.length), self.crc) ^ following.crc
        return Sum(crc, self.length + following.length)

    def __str__(self) -> str:
        return f"{self.length} bytes of CRC-32 {self.crc:08x}"


EMPTY = Sum(0, 0)


class Piece(NamedTuple):
    """A part of a file that is summed in one go."""

    name: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Checksums:
    """What the files below a directory must be."""

    root: Path
    sums: Mapping[str, Sum]

    @classmethod
    def read(cls, root: Path) -> Checksums | None:
        """Return what a directory says of its files, None if it says nothing. Raise DataError if that is damaged."""
        file = root / NAME
        try:
            with _opened(file) as descriptor:
                size = os.fstat(descriptor).st_size
                content = os.pread(descriptor, _MAX_BYTES + 1, 0)
        except OSError as error:
            # A link that leads nowhere was checksums once.
            if isinstance(error, FileNotFoundError) and not os.path.lexists(file):
                return None
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        if len(content) > _MAX_BYTES or len(content) != size:
            raise DataError(f"{file} is damaged: {size} bytes, and {_MAX_BYTES} are allowed")
        return cls(root, _parsed(content, file))

    def write(self) -> None:
        """Write the file, which is on the disk when this returns. Raise OSError."""
        for name in self.sums:
            assert _is_plain(name), f"{name!r} is no plain name"
        lines = [f"{total.crc:08x} {total.length} {name}" for name, total in sorted(self.sums.items())]
        text = "".join(f"{line}\n" for line in (_TITLE, *lines)).encode()
        with (self.root / NAME).open("wb") as file:
            file.write(text + f"{zlib.crc32(text):08x} end\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def misfit(self, there: Collection[str]) -> str | None:
        """Return what is wrong with the names and lengths of the files; None if nothing is.

        `there` are names of files of which none may be new.
        """
        for name, total in self.sums.items():
            file = self.root / name
            try:
                length = os.stat(file).st_size
            except OSError:
                return f"{file} is missing"
            if length != total.length:
                return f"{file} has {length} bytes and not {total.length}"
        extra = next((name for name in sorted(there) if name not in self.sums and name != NAME), None)
        return f"{self.root / extra} was not there when {NAME} was written (remove it)" if extra is not None else None

    def pieces(self, names: Iterable[str] | None = None) -> list[Piece]:
        """Return the parts of some files, of all if nothing is said, in a fixed order.

        `misfit` comes first: lengths that a stranger invented would be many pieces.
        """
        # By length first: 10 after 2, so that ranks get their own files where as many read as wrote.
        chosen = sorted(self.sums if names is None else names, key=lambda name: (len(name), name))
        return [
            Piece(name, start, min(_PIECE, self.sums[name].length - start))
            for name in chosen
            for start in range(0, self.sums[name].length, _PIECE)
        ]

    def crcs(self, pieces: Sequence[Piece], threads: int) -> dict[Piece, int | str]:
        """Read pieces and return the CRC-32 of each, or why it could not be read."""
        buffers = threading.local()

        def crc(piece: Piece) -> int | str:
            if not hasattr(buffers, "room"):
                buffers.room = bytearray(_BLOCK)
            try:
                return _crc(self.root / piece.name, piece, memoryview(buffers.room))
            except OSError as error:
                return error.strerror or str(error)

        with ThreadPoolExecutor(max(1, threads)) as pool:
            return dict(zip(pieces, pool.map(crc, pieces), strict=True))

    def fault(self, pieces: Sequence[Piece], crcs: Mapping[Piece, int | str]) -> str | None:
        """Return which of the files that the pieces make up is another than it was, and why; None if none is."""
        totals: dict[str, Sum] = {}
        for piece in pieces:
            crc = crcs[piece]
            if isinstance(crc, str):
                return f"{self.root / piece.name} cannot be read: {crc}"
            totals[piece.name] = totals.get(piece.name, EMPTY) + Sum(crc, piece.length)
        for name, total in totals.items():
            if total != self.sums[name]:
                return f"{self.root / name} has CRC-32 {total.crc:08x} and not {self.sums[name].crc:08x}"
        return None

    def changed(self, names: Iterable[str] | None = None, *, threads: int = 1) -> str | None:
        """Read some files, all if nothing is said, and return `fault` of them."""
        pieces = self.pieces(names)
        return self.fault(pieces, self.crcs(pieces, threads))


class SummingStream:
    """A file being written whose bytes are summed on their way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sum = EMPTY
        """Of all that was written."""

    def write(self, data: bytes | memoryview) -> int:
        count = self._file.write(data)
        self.sum = Sum(zlib.crc32(data, self.sum.crc), self.sum.length + count)
        return count

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        # Whoever asks wants to sync, and what is in the buffer would be left out.
        self._file.flush()
        return self._file.fileno()


def sum_of(content: bytes | memoryview) -> Sum:
    return Sum(zlib.crc32(content), len(content))


def sum_of_file(file: Path) -> Sum:
    """Read a file in one go. Raise OSError."""
    with _opened(file) as descriptor:
        length = os.fstat(descriptor).st_size
    return Sum(_crc(file, Piece(file.name, 0, length), memoryview(bytearray(_BLOCK))), length)


def _crc(file: Path, piece: Piece, buffer: memoryview) -> int:
    crc, position, end = 0, piece.start, piece.start + piece.length
    with _opened(file) as descriptor:
        while position < end:
            count = os.preadv(descriptor, [buffer[: end - position]], position)
            if count == 0:
                raise OSError("it became shorter")
            crc = zlib.crc32(buffer[:count], crc)
            position += count
    return crc


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    # A pipe in a file's place must not hang.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def _parsed(content: bytes, file: Path) -> dict[str, Sum]:
    body, _, last = content.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n"
    # Asked first: a byte that changed is told as that, and not by the rule that it happens to break.
    if not content.endswith(b"\n") or last != f"{zlib.crc32(body):08x} end".encode():
        raise DataError(f"{file} is damaged: its own checksum, in the last line, is another")
    try:
        title, *lines = body.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text in UTF-8") from None
    if title != _TITLE:
        raise DataError(f"{file}: {title!r:.80} is not '{_TITLE}', which is all that this zoo reads; update zoo")
    found: dict[str, Sum] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or not _is_plain(match[3]) or match[3] in found:
            raise DataError(f"{file}: {line!r:.120} must be CRC-32, length and a plain name that comes once")
        found[match[3]] = Sum(int(match[1], 16), int(match[2]))
    return found


def _is_plain(name: str) -> bool:
    """Whether a name stays below the directory and is one line."""
    parts = name.split("/")
    return len(name) <= _MAX_NAME and name.isprintable() and not {"", ".", ".."} & set(parts) and name != NAME


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """Return x^(8 length), by which a sum is multiplied when so many bytes follow."""
    power, square = 1 << 31, 1 << 23
    while length:
        if length & 1:
            power = _times(power, square)
        square = _times(square, square)
        length >>= 1
    return power


def _times(left: int, right: int) -> int:
    """Multiply two polynomials modulo that of CRC-32."""
    product = 0
    while left:
        if left & 0x80000000:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
