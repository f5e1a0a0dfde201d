"""Safetensors headers, read as if a stranger had written them.

Format (safetensors README): a little-endian u64 N, N bytes of JSON, then the tensors; offsets count from there.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zoo.core.errors import DataError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Stored types that hold weights, by their names in the format and in torch."""
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_MAX_HEADER = 32 << 20
_MAX_TENSORS = 200_000
_MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, after all of the format's rules were checked. Raises DataError naming file and rule.

    The header is bounded before it is parsed; tensors must follow one another without hole, overlap or rest.
    """
    try:
        size = _regular_size(file)
        fields, base = _parsed(file, size)
        tensors = {name: _tensor(file, name, entry, base) for name, entry in fields.items() if name != "__metadata__"}
        _check_coverage(file, tensors, base, size)
        with safe_open(str(file), framework="pt"):
            return tensors
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read as safetensors ({_reason(error)}); fetch it again") from None


def _regular_size(file: Path) -> int:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: not a regular file")
    return status.st_size


def _parsed(file: Path, size: int) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{file}: truncated: {size} bytes, and its header claims {length}; fetch it again")
        if length > _MAX_HEADER:
            raise DataError(f"{file}: its header has {length} bytes, more than the {_MAX_HEADER} that are allowed")
        text = stream.read(length)
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: its header is no valid JSON: {_reason(error)}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: its header is no JSON object")
    if len(fields) > _MAX_TENSORS:
        raise DataError(f"{file}: its header names {len(fields)} tensors, and {_MAX_TENSORS} are allowed")
    return fields, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} appears twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _tensor(file: Path, name: str, entry: Any, base: int) -> StoredTensor:
    place = f"{file}: tensor {name[:120]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{place}: must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DataError(
            f"{place}: stored as {str(dtype)[:20]}, and only {', '.join(DTYPES)} can be trained; "
            f"use an unquantised checkpoint"
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise DataError(f"{place}: shape must be a list of at most {_MAX_DIMS} non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise DataError(f"{place}: data_offsets must be two non-negative integers")
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * BYTES[DTYPES[dtype]]:
        raise DataError(f"{place}: {length} bytes do not hold shape {shape} of {dtype}")
    return StoredTensor(DTYPES[dtype], tuple(shape), base + offsets[0], length)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


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
