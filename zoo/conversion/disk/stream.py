"""Tensors from a source into files, block by block, by several threads; each block is read back and compared.

A block is read at its place in the source, cast, written at its place in the target, and read from there by another
descriptor before the thread goes on: it holds two blocks, and waits for nobody. Blocks follow one another without
overlap, so none can spoil another afterwards. What is read back comes from the page cache: this finds what this
program did wrong, not what a disk loses later.

What is on the disk leaves the page cache at once. The next blocks take the pages that it had, so a checkpoint of any
size passes through a few hundred megabytes of them: what other programs had cached stays, and no page has to be fetched
new, which costs more than the copying on a virtual machine whose host must find it first.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zoo import DataError, TensorSource
from zoo.conversion.disk.headers import read_header
from zoo.conversion.disk.unfinished import Journal, sync
from zoo.conversion.disk.writer import BLOCK_BYTES, Block, Outgoing, Shard
from zoo.core.machine.device import num_cores
from zoo.core.storage.checksums import Sum, sum_of

Tick = Callable[[int], None]
"""Told of bytes as they are done."""

_RUN_BYTES = 256 << 20
_RUNS_AHEAD = 2
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
        self._writing = threading.Lock()
        self._sums: dict[tuple[str, int], Sum] = {}

    def write(self, shards: Sequence[Shard]) -> dict[str, Sum]:
        """Returns the checksum of each shard when everything is on the disk.

        Raises DataError where a value overflows its new dtype or bytes read back differently, OSError where the disk
        does not take them.
        """
        totals = {}
        with ThreadPoolExecutor(1) as disk:
            waiting: deque[Future[None]] = deque()
            for shard in shards:
                file, blocks = self._directory / shard.name, self._start(shard)
                with _opened(file, os.O_RDWR) as target, _opened(file, os.O_RDONLY) as reader:
                    for run in _runs(blocks):
                        in_parallel(self._threads, partial(self._settle, shard, target, reader), run)
                        # The disk takes it while the next is written; that may be ahead of it by one more.
                        waiting.append(disk.submit(_put_away, file))
                        if len(waiting) > _RUNS_AHEAD:
                            waiting.popleft().result()
                self._check(shard)
                # Blocks were summed by several threads in any order; the file has one.
                totals[shard.name] = sum((self._sums.pop((shard.name, b.offset)) for b in blocks), sum_of(shard.header))
            for done in waiting:
                done.result()
        return totals

    def _start(self, shard: Shard) -> Sequence[Block]:
        """A file with its header; the blocks to follow. A file that had its full size now would be slow to write."""
        blocks, end = list(shard.blocks()), len(shard.header)
        with _opened(self._directory / shard.name, os.O_RDWR | os.O_CREAT) as descriptor:
            _write_all(descriptor, memoryview(shard.header), 0)
        for block in blocks:
            assert block.offset == end, "blocks follow one another"
            end += block.length
        assert end == shard.size, "blocks fill the file"
        return blocks

    def _check(self, shard: Shard) -> None:
        """The file as long as it should be, with a header that says to a reader what was written where."""
        file = self._directory / shard.name
        if file.stat().st_size != shard.size:
            os.truncate(file, shard.size)
            sync(file)
        places = {name: tensor.start for name, tensor in read_header(file).tensors.items()}
        if places != shard.places:
            raise DataError(f"{file} reads back with another header than was written; check the disk and try again")

    def _settle(self, shard: Shard, target: int, reader: int, block: Block, buffer: Tensor) -> None:
        """Write a block unless an earlier attempt did and it is there: a machine that went down may have lost it."""
        data, back = _bytes(self._block(block, buffer[:-BLOCK_BYTES])), buffer[-BLOCK_BYTES:]
        if (shard.name, block.offset) not in self._journal.found or not _is_there(reader, block, data, back):
            # A file takes one write at a time; who waits here leaves the processor to who reads.
            with self._writing:
                _write_all(target, data, block.offset)
            if not _is_there(reader, block, data, back):
                raise DataError(
                    f"{block.tensor.name} reads back differently from what was written; check the disk and try again"
                )
            self._journal.add(shard.name, block.offset)
        self._sums[shard.name, block.offset] = sum_of(data)
        self._tick(block.length)

    def _block(self, block: Block, buffer: Tensor) -> Tensor:
        """Its values as they are to be written."""
        return _cast(self._source.read(block.tensor.name, block.index, buffer), block.tensor)


def checksum(source: TensorSource, tensor: Outgoing, tick: Tick = lambda _count: None) -> int:
    """CRC-32 of a tensor's bytes as they are, or would be, written. Raises DataError."""
    total, buffer = 0, _buffer()
    for block in Shard("", [tensor]).blocks():
        total = zlib.crc32(_bytes(_cast(source.read(tensor.name, block.index, buffer), tensor)), total)
        tick(block.length)
    return total


def default_threads() -> int:
    """The processors this process may use, at most 8: a file takes one write at a time, so more only wait for it."""
    return min(8, num_cores())


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


def _put_away(file: Path) -> None:
    """What is written, on the disk and out of the page cache."""
    with _opened(file, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _buffer() -> Tensor:
    """Room for a block in any dtype, and one more as it is written.

    Blocks from malloc would be kept by its arenas, some of them for each thread.
    """
    return torch.empty((_WIDEST + 1) * BLOCK_BYTES, dtype=torch.uint8)


def _is_there(reader: int, block: Block, data: memoryview, buffer: Tensor) -> bool:
    """Whether the file has these bytes at a block's place."""
    found = buffer[: block.length].numpy()
    count = os.preadv(reader, [found.data], block.offset)
    return count == block.length and np.array_equal(found, np.frombuffer(data, np.uint8))


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
