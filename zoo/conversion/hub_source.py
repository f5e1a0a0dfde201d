"""Tensors of a safetensors checkpoint, single or sharded, read by byte ranges."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zoo.conversion.files import identity, open_file
from zoo.conversion.headers import MAX_TENSORS, StoredTensor, read_header
from zoo.core.errors import DataError
from zoo.core.rules import Index, row_blocks, whole

_BLOCK_VALUES = 1 << 22
_MAX_SHARDS = 2000


@dataclass(frozen=True, eq=False)
class HubSource:
    """A TensorSource over checked files, each opened at its first read."""

    path: Path
    tensors: Mapping[str, tuple[Path, StoredTensor]]
    identities: Mapping[Path, tuple[int, int, int, int]]
    """What the files were when they were checked (zoo.conversion.files)."""
    _descriptors: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def single(cls, file: Path) -> HubSource:
        """One file. Raises DataError."""
        header = read_header(file)
        return cls(
            file.parent, {name: (file, tensor) for name, tensor in header.tensors.items()}, {file: header.identity}
        )

    @classmethod
    def sharded(cls, directory: Path, weight_map: Mapping[str, str], *, index: Path) -> HubSource:
        """The shards an index names, each with exactly the tensors the index says. Raises DataError."""
        found: dict[str, tuple[Path, StoredTensor]] = {}
        identities: dict[Path, tuple[int, int, int, int]] = {}
        for shard in _shards(directory, weight_map, index):
            file = directory / shard
            header = read_header(file)
            identities[file] = header.identity
            for name, tensor in header.tensors.items():
                _check_place(index, name, shard, weight_map)
                found[name] = file, tensor
        absent = sorted(weight_map.keys() - found.keys())
        if absent:
            raise DataError(f"{index}: tensor {absent[0]!r} is not in {weight_map[absent[0]]}; fetch that file again")
        return cls(directory, found, identities)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1].shape

    def dtype(self, name: str) -> str:
        return self.tensors[name][1].dtype

    def read(self, name: str, index: Index) -> Tensor:
        """A piece in its stored dtype; only its rows are read. Raises DataError if the file changed meanwhile."""
        file, tensor = self.tensors[name]
        if any(not 0 <= i.start <= i.stop <= size for i, size in zip(index, tensor.shape, strict=True)):
            raise ValueError(f"{index} lies outside of {name}, which is {list(tensor.shape)}")
        if index[1:] == whole(tensor.shape[1:]):
            return self._rows(file, tensor, index)
        out = torch.empty([i.stop - i.start for i in index], dtype=getattr(torch, tensor.dtype))
        for block in row_blocks((index[0], *whole(tensor.shape[1:])), values=_BLOCK_VALUES):
            place = slice(block[0].start - index[0].start, block[0].stop - index[0].start)
            out[place] = self._rows(file, tensor, block)[(slice(None), *index[1:])]
        return out

    def _rows(self, file: Path, tensor: StoredTensor, index: Index) -> Tensor:
        """Whole rows, which are contiguous."""
        shape = [i.stop - i.start for i in index]
        row = tensor.length // tensor.shape[0] if index and tensor.shape[0] else tensor.length
        start, length = (index[0].start * row, shape[0] * row) if index else (0, tensor.length)
        raw = torch.empty(length, dtype=torch.uint8)
        view, position = raw.numpy().data, tensor.start + start
        while view:
            count = os.preadv(self._descriptor(file), [view], position)
            if count == 0:
                raise DataError(f"{file}: became shorter while it was read; fetch it again")
            view, position = view[count:], position + count
        self._check_unchanged(file)
        return raw.view(getattr(torch, tensor.dtype)).view(shape)

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = descriptor = open_file(file)
            weakref.finalize(self, os.close, descriptor)
            self._check_unchanged(file)
        return self._descriptors[file]

    def _check_unchanged(self, file: Path) -> None:
        if identity(self._descriptors[file]) != self.identities[file]:
            raise DataError(f"{file}: changed since its header was checked; start again when nothing writes to it")


def _shards(directory: Path, weight_map: Mapping[str, str], index: Path) -> list[str]:
    """File names of all shards, which are there."""
    shards = sorted(set(weight_map.values()))
    if len(weight_map) > MAX_TENSORS or len(shards) > _MAX_SHARDS:
        raise DataError(
            f"{index}: names {len(weight_map)} tensors in {len(shards)} files, and {MAX_TENSORS} in {_MAX_SHARDS} are "
            f"allowed"
        )
    missing = [shard for shard in shards if not os.path.exists(directory / shard)]
    if missing:
        name = next(name for name, where in weight_map.items() if where == missing[0])
        raise DataError(f"{index}: tensor {name!r} should be in {missing[0]}, which is missing; fetch it again")
    return shards


def _check_place(index: Path, name: str, shard: str, weight_map: Mapping[str, str]) -> None:
    """A shard may only hold what the index puts there: loaders disagree about which of two copies wins."""
    place = weight_map.get(name)
    if place is None:
        raise DataError(f"{index}: {shard} has tensor {name[:120]!r}, which the index does not name; fetch both again")
    if place != shard:
        raise DataError(f"{index}: tensor {name[:120]!r} is in {shard} as well as in {place}; keep one of them")
