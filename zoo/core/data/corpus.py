"""One pass after another over a corpus: the order of its shards, and its records in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.core.contracts.data import DataSource, Record
from zoo.core.registry.answers import check_record

BLOCK_RECORDS = 256
BLOCK_CHARACTERS = 1 << 20
"""A block ends with the record that reaches either; so it holds a megabyte of text, or one record that is longer."""


@dataclass(frozen=True, slots=True)
class Place:
    """A position in an epoch: the shard, by its place in the epoch's order, and an offset in it."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class Found:
    """A record, where it can be read again, and the place after it."""

    record: Record
    at: Place
    after: Place


class Corpus:
    """A source's records, each exactly once an epoch; shards in an order drawn from seed and epoch.

    What is held in memory is the names of the shards and one block.
    """

    def __init__(self, source: DataSource, *, seed: int, name: str = "") -> None:
        """`name` is what the user calls it, for error messages."""
        self.source = source
        self.name = name
        self.seed = seed
        self.shards = tuple(source.shards())

    def order(self, epoch: int) -> tuple[str, ...]:
        """The shards of an epoch, shuffled."""
        return tuple(self.shards[i] for i in shuffled(len(self.shards), self.seed, epoch))

    def blocks(self, epoch: int, start: Place) -> Iterator[list[Found]]:
        """Records from a place to the end of the epoch."""
        block: list[Found] = []
        size = 0
        for found in self._records(epoch, start):
            block.append(found)
            size += characters(found.record.fields)
            if len(block) == BLOCK_RECORDS or size >= BLOCK_CHARACTERS:
                yield block
                block, size = [], 0
        if block:
            yield block

    def at(self, epoch: int, place: Place) -> Record | None:
        """The record at a place, None if there is none (any more)."""
        found = next(self._records(epoch, place), None)
        return found.record if found is not None and found.at == place else None

    def _records(self, epoch: int, start: Place) -> Iterator[Found]:
        order = self.order(epoch)
        for shard in range(start.shard, len(order)):
            at = start if shard == start.shard else Place(shard, 0)
            for record, offset in read_shard(self.source, order[shard], at.offset):
                after = Place(shard, offset)
                yield Found(record, at, after)
                at = after


def read_shard(source: DataSource, shard: str, offset: int) -> Iterator[tuple[Record, int]]:
    """Records of a shard from an offset on, the first of them looked at."""
    found = iter(source.read(shard, offset))
    first = next(found, None)
    if first is not None:
        check_record(source, offset, first)
        yield first
        yield from found


def shuffled(count: int, *key: int) -> list[int]:
    """0 to count - 1 in an order drawn from a key of integers: the same on every machine."""
    # SeedSequence takes no negative numbers.
    generator = np.random.default_rng([part & 0xFFFF_FFFF_FFFF_FFFF for part in key])
    return [int(i) for i in generator.permutation(count)]


def characters(value: Any) -> int:
    """About how much text a record holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(item) for item in value.values())
    return sum(characters(item) for item in value) if isinstance(value, list) else 1
