"""Safetensors headers, read as if a stranger had written them.

Format (safetensors README): a little-endian u64 N, N bytes of JSON, then the tensors; offsets count from there.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zoo import DataError
from zoo.conversion.disk.files import identity, opened
from zoo.conversion.disk.strict_json import parse_object

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Stored types that hold weights, by their names in the format and in torch."""
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_MAX_HEADER = 8 << 20
_MAX_IN_FILE = 20_000
_MAX_DIMS = 8
_MAX_SIZE = 1 << 48
"""Values a shape may speak of, dims of 0 aside. A tensor without values would else name any dims at all."""
NAME = re.compile(r"[!-~]{1,256}")
NAME_RULE = "1 to 256 printable ASCII characters without spaces"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds, and which file that was: `identity` is that of zoo.conversion.disk.files."""

    tensors: Mapping[str, StoredTensor]
    identity: tuple[int, int, int, int]


def read_header(file: Path) -> Header:
    """Every tensor of a file, after all of the format's rules were checked. Raises DataError naming file and rule.

    The header is bounded before it is parsed; tensors must follow one another without hole, overlap or rest.
    """
    try:
        with opened(file) as descriptor:
            found = identity(descriptor)
            with _no_collector():
                tensors = _tensors(file, descriptor)
        with safe_open(str(file), framework="pt"):
            return Header(tensors, found)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read as safetensors ({_reason(error)}); fetch it again") from None


@contextmanager
def _no_collector() -> Iterator[None]:
    """Thousands of small objects and not one cycle: looking for cycles in between takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _tensors(file: Path, descriptor: int) -> dict[str, StoredTensor]:
    fields, base = _parsed(file, descriptor)
    fields.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, base) for name, entry in fields.items()}
    _check_coverage(file, tensors, base, os.fstat(descriptor).st_size)
    return tensors


def _parsed(file: Path, descriptor: int) -> tuple[dict[str, Any], int]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise DataError(f"{file}: truncated: {size} bytes, and its header claims {length}; fetch it again")
    if length > _MAX_HEADER:
        raise DataError(f"{file}: its header has {length} bytes, more than the {_MAX_HEADER} that are allowed")
    text = os.pread(descriptor, length, 8)
    if len(text) != length:
        raise DataError(f"{file}: became shorter while it was read; fetch it again")
    # A tensor has an object, two lists, and at most 4 + dims commas; the rest is for `__metadata__`.
    containers, values = 3 * _MAX_IN_FILE + 8, (5 + _MAX_DIMS) * _MAX_IN_FILE
    fields = parse_object(text, f"{file}: its header", values=values, containers=containers)
    if len(fields) > _MAX_IN_FILE + 1:
        raise DataError(f"{file}: its header names {len(fields)} tensors, and {_MAX_IN_FILE} are allowed")
    return fields, 8 + length


def _tensor(file: Path, name: str, entry: Any, base: int) -> StoredTensor:
    place = f"{file}: tensor {name[:120]!r}"
    if not NAME.fullmatch(name):
        raise DataError(f"{place}: a name must be {NAME_RULE}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{place}: must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DataError(
            f"{place}: stored as {dtype!r:.40}, and only {', '.join(DTYPES)} can be trained; "
            f"use an unquantised checkpoint"
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise DataError(f"{place}: shape must be a list of at most {_MAX_DIMS} non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise DataError(f"{place}: data_offsets must be two non-negative integers")
    if math.prod(size or 1 for size in shape) > _MAX_SIZE:
        raise DataError(f"{place}: shape {shape} is more than the {_MAX_SIZE} values that are allowed")
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * BYTES[DTYPES[dtype]]:
        raise DataError(f"{place}: {length} bytes do not hold shape {shape} of {dtype}")
    return StoredTensor(DTYPES[dtype], tuple(shape), base + offsets[0], length)


def _naturals(value: Any) -> bool:
    """Whether it is a list of integers that fit the format's own 64 bits."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_coverage(file: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    end = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].length)):
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "leaves a hole before it"
            raise DataError(f"{file}: tensor {name[:120]!r} {what}")
        end += tensor.length
    if end != size:
        what = "truncated" if end > size else "longer than its tensors"
        raise DataError(f"{file}: {what}: {size} bytes, and its header speaks of {end}; fetch it again")


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
