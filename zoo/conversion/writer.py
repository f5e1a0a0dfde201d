"""Safetensors files written as a stream: header first, then tensor by tensor, a block at a time."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from zoo.conversion.directory import INDEX, SINGLE
from zoo.conversion.headers import BYTES, DTYPES
from zoo.core.contracts import TensorSource
from zoo.core.errors import DataError
from zoo.core.rules import row_blocks, whole

_CODES = {name: code for code, name in DTYPES.items()}
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def length(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def write_tensors(
    directory: Path, source: TensorSource, tensors: Sequence[Outgoing], *, shard_bytes: int
) -> Mapping[str, int]:
    """Write all tensors into shards of at most so many bytes, and the index if there are several.

    Returns the CRC-32 of each tensor's bytes. Raises DataError where a value overflows its new dtype, OSError
    where the disk does not take it.
    """
    shards = plan_shards(tensors, shard_bytes)
    checksums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb") as file:
            checksums |= _write_shard(file, source, shard)
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.length for tensor in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return checksums


def plan_shards(tensors: Iterable[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Fill shards in order; a tensor is never split, so one above the limit has a shard of its own."""
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.length > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.length
    return shards


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """As the hub writes it: indented, sorted, UTF-8; on the disk when this returns."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _write_shard(file: BinaryIO, source: TensorSource, shard: Sequence[Outgoing]) -> dict[str, int]:
    # Wide types first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(shard, key=lambda tensor: -BYTES[tensor.dtype])
    file.write(_header(ordered))
    checksums = {}
    for tensor in ordered:
        checksum = 0
        for block in row_blocks(whole(tensor.shape), values=_BLOCK_VALUES):
            data = raw_bytes(_cast(source.read(tensor.name, block), tensor))
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        checksums[tensor.name] = checksum
    return checksums


def _header(tensors: Sequence[Outgoing]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.length]
        fields[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.length
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _cast(values: Tensor, tensor: Outgoing) -> Tensor:
    cast = values.to(getattr(torch, tensor.dtype))
    if cast.dtype != values.dtype and bool((cast.isinf() & values.isfinite()).any()):
        largest = values[values.isfinite()].abs().max().item()
        raise DataError(
            f"{tensor.name} has a value of {largest:g}, which {tensor.dtype} cannot hold; export with --dtype bfloat16 "
            f"or float32"
        )
    return cast
