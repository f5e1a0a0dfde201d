"""Tensors of a safetensors checkpoint, single or sharded, read by byte ranges."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zoo import DataError
from zoo.conversion.disk.headers import Header, read_header
from zoo.conversion.disk.ranges import Files, Place
from zoo.core.contracts.weights import Index
from zoo.core.model.inventory import MAX_TENSORS

_MAX_SHARDS = 2000


class HubSource:
    """A TensorSource over checked files."""

    def __init__(self, path: Path, headers: Mapping[Path, Header]) -> None:
        self.path = path
        self._headers = headers
        self._files = Files({file: header.identity for file, header in headers.items()})
        self._places = {
            name: Place(file, tensor.start, tensor.shape, getattr(torch, tensor.dtype))
            for file, header in headers.items()
            for name, tensor in header.tensors.items()
        }

    @classmethod
    def single(cls, file: Path) -> HubSource:
        """One file. Raises DataError."""
        return cls(file.parent, {file: read_header(file)})

    @classmethod
    def sharded(cls, directory: Path, weight_map: Mapping[str, str], *, index: Path) -> HubSource:
        """The shards an index names, each with exactly the tensors the index says. Raises DataError."""
        headers = {}
        for shard in _shards(directory, weight_map, index):
            headers[directory / shard] = header = read_header(directory / shard)
            for name in header.tensors:
                _check_place(index, name, shard, weight_map)
        absent = sorted(weight_map.keys() - {name for header in headers.values() for name in header.tensors})
        if absent:
            raise DataError(f"{index}: tensor {absent[0]!r} is not in {weight_map[absent[0]]}; fetch that file again")
        return cls(directory, headers)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> Collection[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        return str(self._places[name].dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Of the files' names, sizes, times and headers."""
        digest = hashlib.sha256()
        for file, header in sorted(self._headers.items()):
            digest.update(repr((file.name, header.identity[2:], sorted(header.tensors.items()))).encode())
        return digest.hexdigest()

    def read(self, name: str, index: Index, buffer: Tensor | None = None) -> Tensor:
        """A piece in its stored dtype; little more than it is read. Raises DataError if the file changed meanwhile."""
        place = self._places[name]
        if any(not 0 <= i.start <= i.stop <= size for i, size in zip(index, place.shape, strict=True)):
            raise ValueError(f"{index} lies outside of {name}, which is {list(place.shape)}")
        return self._files.read(place, index, buffer)


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
