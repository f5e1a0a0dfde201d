"""Tensors from a source into files, block by block, by several threads; each block is read back and compared.

A block is read at its place in the source, cast, summed (CRC-32), and written at its place in the target: no thread
holds more than one, and none waits for another. Reading back goes through the header that was written, and mostly
through the page cache: it finds what this program did wrong, not what a disk loses later.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zoo.conversion.hub_source import HubSource
from zoo.conversion.unfinished import Journal, sync
from zoo.conversion.writer import BLOCK_BYTES, Block, Outgoing, Shard
from zoo.core.contracts import TensorSource
from zoo.core.errors import DataError

Tick = Callable[[int], None]
"""Told of bytes as they are done; each byte is told twice, once written and once compared."""

_RUN_BYTES = 256 << 20
_WIDEST = 4  # float64 read for bfloat16

_Item = TypeVar("_Item")


class Stream:
    """Writes shards into a directory, what its journal does not have yet, and compares all of it."""

    def __init__(self, directory: Path, source: TensorSource, journal: Journal, *, threads: int, tick: Tick) -> None:
        self._directory = directory
        self._source = source
        self._journal = journal
        self._threads = threads
        self._tick = tick
        self._checksums = dict(journal.found)
        self._writing = threading.Lock()

    def write(self, shards: Sequence[Shard]) -> None:
        """Returns when everything is on the disk.

        Raises DataError where a value overflows its new dtype or bytes read back differently, OSError where the disk
        does not take them.
        """
        with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as reader:
            waiting: list[Future[None]] = []
            for shard in shards:
                waiting += self._fill(shard, disk)
                # Compared while the next one is written.
                waiting.append(reader.submit(self._check, shard))
            for done in waiting:
                done.result()

    def _fill(self, shard: Shard, disk: ThreadPoolExecutor) -> Sequence[Future[None]]:
        """Write what the journal lacks of a shard, which is put on the disk meanwhile."""
        blocks, file = list(shard.blocks()), self._directory / shard.name
        todo = [block for block in blocks if (shard.name, block.offset) not in self._checksums]
        self._tick(sum(block.length for block in blocks) - sum(block.length for block in todo))
        syncs = []
        for run in _runs(todo):
            self._write(shard, run)
            syncs.append(disk.submit(sync, file))
        if file.stat().st_size != shard.size:
            os.truncate(file, shard.size)
        return syncs

    def _check(self, shard: Shard) -> None:
        """Compare a shard as it is now. Blocks of an earlier attempt may be lost; they are written again."""
        wrong = self._differing(shard, list(shard.blocks()))
        # A machine that went down may have kept the journal and lost the bytes.
        lost = [block for block in wrong if (shard.name, block.offset) in self._journal.found]
        if lost:
            self._write(shard, lost)
            sync(self._directory / shard.name)
            wrong = [block for block in wrong if block not in lost] + self._differing(shard, lost)
        if wrong:
            raise DataError(
                f"{wrong[0].tensor.name} reads back differently from what was written; check the disk and try again"
            )

    def _write(self, shard: Shard, blocks: Sequence[Block]) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._directory / shard.name, flags, 0o666)
        try:
            _write_all(descriptor, memoryview(shard.header), 0)
            in_parallel(self._threads, partial(self._write_block, shard, descriptor), blocks)
        finally:
            os.close(descriptor)

    def _write_block(self, shard: Shard, descriptor: int, block: Block, buffer: Tensor) -> None:
        data = _bytes(_cast(self._source.read(block.tensor.name, block.index, buffer), block.tensor))
        total = zlib.crc32(data)
        # A file takes one write at a time; who waits here leaves the processor to who reads.
        with self._writing:
            _write_all(descriptor, data, block.offset)
        self._journal.add(shard.name, block.offset, total)
        self._checksums[shard.name, block.offset] = total
        self._tick(block.length)

    def _differing(self, shard: Shard, blocks: Sequence[Block]) -> list[Block]:
        """Blocks that a reader of the file finds with other bytes."""
        written, wrong = HubSource.single(self._directory / shard.name), list[Block]()

        def compare(block: Block, buffer: Tensor) -> None:
            found = zlib.crc32(_bytes(written.read(block.tensor.name, block.index, buffer)))
            if found != self._checksums[shard.name, block.offset]:
                wrong.append(block)
            self._tick(block.length)

        in_parallel(self._threads, compare, blocks)
        return wrong


def checksum(source: TensorSource, tensor: Outgoing, tick: Tick = lambda _count: None) -> int:
    """CRC-32 of a tensor's bytes as they are, or would be, written. Raises DataError."""
    total, buffer = 0, _buffer()
    for block in Shard("", [tensor]).blocks():
        total = zlib.crc32(_bytes(_cast(source.read(tensor.name, block.index, buffer), tensor)), total)
        tick(block.length)
    return total


def default_threads() -> int:
    """Twice the processors this process may use, as each thread waits for the disk half of its time; at most 8."""
    return min(8, 2 * len(os.sched_getaffinity(0)))


def in_parallel(threads: int, work: Callable[[_Item, Tensor], None], items: Iterable[_Item]) -> None:
    """Do all of it, items in about their order; `work` gets a buffer too. The first error ends it and is raised."""
    waiting, lock, errors = iter(items), threading.Lock(), list[BaseException]()

    def take() -> None:
        buffer = _buffer()
        while not errors:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            try:
                work(item, buffer)
            except BaseException as error:
                errors.append(error)

    with ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        # Should this thread be interrupted, the others end after their block.
        stack.callback(errors.append, InterruptedError())
        for running in [pool.submit(take) for _ in range(threads)]:
            running.result()
        stack.pop_all()
    if errors:
        raise errors[0]


def _runs(blocks: Sequence[Block]) -> Iterator[Sequence[Block]]:
    """At least one run, each but the last of `_RUN_BYTES`: the disk starts on one while the next is written."""
    start = size = 0
    for number, block in enumerate(blocks):
        size += block.length
        if size >= _RUN_BYTES:
            yield blocks[start : number + 1]
            start, size = number + 1, 0
    if start < len(blocks) or not blocks:
        yield blocks[start:]


def _buffer() -> Tensor:
    """Room for a block in any dtype. Blocks from malloc would be kept by its arenas, some of them for each thread."""
    return torch.empty(_WIDEST * BLOCK_BYTES, dtype=torch.uint8)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _cast(values: Tensor, tensor: Outgoing) -> Tensor:
    cast = values.to(getattr(torch, tensor.dtype))
    if cast.dtype != values.dtype and bool((cast.isinf() & values.isfinite()).any()):
        largest = values[values.isfinite()].abs().max().item()
        raise DataError(
            f"{tensor.name} has a value of {largest:g}, which {tensor.dtype} cannot hold; convert with "
            f"--dtype bfloat16 or float32"
        )
    return cast
