"""What files a checkpoint is written as: shards, headers, index, and where each block of each tensor lies."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zoo import UsageError
from zoo.conversion.disk.directory import INDEX, SINGLE
from zoo.conversion.disk.headers import BYTES, DTYPES
from zoo.core.contracts.weights import Index
from zoo.core.model.rules import row_blocks, whole

SHARD_BYTES = 5_000_000_000
"""The hub's own limit, in decimal gigabytes."""

BLOCK_BYTES = 1 << 20
"""What is read, cast, summed and written at a time by each thread."""

_CODES = {name: code for code, name in DTYPES.items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_FACTOR = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def length(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a tensor's bytes and its first byte in the shard."""

    tensor: Outgoing
    index: Index
    offset: int
    length: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be written. Wide types come first, so that every tensor starts at a multiple of its item
    size."""

    name: str
    tensors: Sequence[Outgoing]

    @cached_property
    def header(self) -> bytes:
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._ordered:
            offsets = [offset, offset + tensor.length]
            fields[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            offset += tensor.length
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.length for tensor in self.tensors)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The first byte of each tensor in the file."""
        found, offset = {}, len(self.header)
        for tensor in self._ordered:
            found[tensor.name] = offset
            offset += tensor.length
        return found

    def blocks(self) -> Iterator[Block]:
        """All of its tensors' bytes, in the order of the file."""
        for tensor in self._ordered:
            offset, item = self.places[tensor.name], BYTES[tensor.dtype]
            for index in row_blocks(whole(tensor.shape), values=BLOCK_BYTES // item):
                length = item * math.prod(part.stop - part.start for part in index)
                yield Block(tensor, index, offset, length)
                offset += length

    @property
    def _ordered(self) -> list[Outgoing]:
        return sorted(self.tensors, key=lambda tensor: -BYTES[tensor.dtype])


def plan_shards(tensors: Iterable[Outgoing], limit: int) -> list[Shard]:
    """Fill shards in order; a tensor is never split, so one above the limit has a shard of its own."""
    groups: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.length > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.length
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [Shard(name, group) for name, group in zip(names, groups, strict=True)]


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Which tensor is in which shard, if there are several."""
    if len(shards) > 1:
        total = sum(tensor.length for shard in shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """As the hub writes it: indented, sorted, UTF-8; on the disk when this returns."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def parse_size(text: str) -> int:
    """`5GB` is 5,000,000,000 bytes, as the hub counts. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _FACTOR[match[2].upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--shard-size {text}: not a size; write one like 5GB or 500MB")
    return size
