"""Row-major arrays in files, read box by box at known places: byte ranges, never a map, by any number of threads."""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo import DataError
from zoo.conversion.disk.files import identity, open_file
from zoo.core.contracts.weights import Index, Shape
from zoo.core.model.rules import row_blocks, whole

_SHORT, _ROW = 4 << 10, 16 << 10
"""Bytes: shorter runs out of rows no longer than that are read with their rows, as a call for each would cost more."""
_WIDE = 4 << 20
"""Bytes of such rows that are read at a time."""

_AHEAD = 8 << 20
"""How far before its reader the disk is asked for the next bytes; threads that read by turns hide them from it."""

Identity = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """An array in a file: `start` is its first byte, and its rows follow in C order."""

    file: Path
    start: int
    shape: Shape
    dtype: torch.dtype


class Files:
    """Files that stay what they were, each opened at its first read and closed with this object."""

    def __init__(self, identities: Mapping[Path, Identity] | None = None) -> None:
        """`identities` is what files were when they were checked; others count from their first read."""
        self._identities = dict(identities or {})
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, place: Place, index: Index, buffer: Tensor | None = None) -> Tensor:
        """A box of an array, `index` inside its shape, in `buffer` if it is there and large enough.

        Reads about the box's bytes, and needs little more memory.

        Raises DataError if the file is missing, became shorter or changed, OSError where it cannot be read.
        """
        out = _room([i.stop - i.start for i in index], place.dtype, buffer)
        outer, run = _run_dim(place, index), _run_bytes(place, index)
        if not out.numel():
            return out
        if out.shape[:outer].numel() > 1 and run < _SHORT and _row_bytes(place, outer) <= _ROW:
            self._read_rows(place, index, out, outer)
            return out
        view = out.reshape(-1).view(torch.uint8).numpy().data
        for number, offset in enumerate(_offsets(place, index)):
            self._fill(place.file, view[number * run : (number + 1) * run], place.start + offset)
        return out

    def read_bytes(self, file: Path, start: int, length: int) -> bytes:
        """Raises as `read` does."""
        content = bytearray(length)
        self._fill(file, memoryview(content), start)
        return bytes(content)

    def size(self, file: Path) -> int:
        """Bytes of a file. Raises DataError if it cannot be opened."""
        return os.fstat(self._descriptor(file)).st_size

    def _read_rows(self, place: Place, index: Index, out: Tensor, outer: int) -> None:
        """By whole rows, of which the part that dim `outer` asks for is kept."""
        rows = whole(place.shape[outer:])
        for block in row_blocks(index[:outer], values=_WIDE // _row_bytes(place, outer)):
            here = tuple(slice(b.start - i.start, b.stop - i.start) for b, i in zip(block, index[:outer], strict=True))
            out[here] = self.read(place, (*block, *rows))[(slice(None),) * outer + (index[outer],)]

    def _fill(self, file: Path, view: memoryview, position: int) -> None:
        descriptor = self._descriptor(file)
        if len(view) > _ROW:
            os.posix_fadvise(descriptor, position + _AHEAD, len(view), os.POSIX_FADV_WILLNEED)
        try:
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise DataError(f"{file}: became shorter while it was read; fetch it again")
                view, position = view[count:], position + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None
        self._check(file, descriptor)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = open_file(file)
                weakref.finalize(self, os.close, descriptor)
                self._identities.setdefault(file, identity(descriptor))
                self._check(file, descriptor)
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _check(self, file: Path, descriptor: int) -> None:
        if identity(descriptor) != self._identities[file]:
            raise DataError(f"{file}: changed since its header was checked; start again when nothing writes to it")


def _room(shape: Sequence[int], dtype: torch.dtype, buffer: Tensor | None) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if buffer is None or buffer.numel() < size or not size:
        return torch.empty(shape, dtype=dtype)
    return buffer[:size].view(dtype).view(shape)


def _run_dim(place: Place, index: Index) -> int:
    """The dim from which on a box is contiguous."""
    return max((d for d, part in enumerate(index) if part != slice(0, place.shape[d])), default=0)


def _run_bytes(place: Place, index: Index) -> int:
    size = place.dtype.itemsize
    for part in index[_run_dim(place, index) :]:
        size *= part.stop - part.start
    return size


def _row_bytes(place: Place, dim: int) -> int:
    return math.prod(place.shape[dim:]) * place.dtype.itemsize


def _offsets(place: Place, index: Index) -> Iterator[int]:
    """Where the contiguous runs of a box begin, in bytes from the array's start, in C order."""
    run = _run_dim(place, index)
    strides = [_row_bytes(place, d + 1) for d in range(len(index))]
    first = index[run].start * strides[run] if index else 0
    for outer in itertools.product(*(range(part.start, part.stop) for part in index[:run])):
        yield first + sum(i * stride for i, stride in zip(outer, strides, strict=False))
