"""Tensors from a source into files, block by block, by several threads; each block is read back and compared.

A block is read at its place in the source, cast, and written at its place in the target; when 256 MiB are, they are
read on both sides once more and compared while the next are written: a thread holds two blocks, and none waits for
another. Reading back mostly goes through the page cache: it finds what this program did wrong, not what a disk loses
later.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zoo.conversion.headers import read_header
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
        self._writing = threading.Lock()

    def write(self, shards: Sequence[Shard]) -> None:
        """Returns when everything is on the disk.

        Raises DataError where a value overflows its new dtype or bytes read back differently, OSError where the disk
        does not take them.
        """
        with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as reader:
            waiting: list[Future[None]] = []
            for shard in shards:
                self._start(shard)
                for run in _runs(list(shard.blocks())):
                    self._write(shard, [block for block in run if not self._found(shard, block)])
                    waiting.append(disk.submit(sync, self._directory / shard.name))
                    waiting.append(reader.submit(self._check, shard, run))
            for done in waiting:
                done.result()

    def _start(self, shard: Shard) -> None:
        """The file in its full size, and a header that says to a reader what is to be written where."""
        file = self._directory / shard.name
        with _opened(file) as descriptor:
            _write_all(descriptor, memoryview(shard.header), 0)
            if os.fstat(descriptor).st_size != shard.size:
                os.ftruncate(descriptor, shard.size)
        places = {name: tensor.start for name, tensor in read_header(file).tensors.items()}
        if places != shard.places:
            raise DataError(f"{file} reads back with another header than was written; check the disk and try again")

    def _check(self, shard: Shard, run: Sequence[Block]) -> None:
        """Compare what was written. Blocks of an earlier attempt may be lost; they are written again."""
        wrong = self._differing(shard, run)
        # A machine that went down may have kept the journal and lost the bytes.
        lost = [block for block in wrong if self._found(shard, block)]
        if lost:
            self._write(shard, lost)
            sync(self._directory / shard.name)
            wrong = [block for block in wrong if block not in lost] + self._differing(shard, lost)
        if wrong:
            raise DataError(
                f"{wrong[0].tensor.name} reads back differently from what was written; check the disk and try again"
            )

    def _found(self, shard: Shard, block: Block) -> bool:
        """Whether an earlier attempt wrote it."""
        return (shard.name, block.offset) in self._journal.found

    def _write(self, shard: Shard, blocks: Sequence[Block]) -> None:
        def write(block: Block, buffer: Tensor) -> None:
            data = _bytes(self._block(block, buffer))
            # A file takes one write at a time; who waits here leaves the processor to who reads.
            with self._writing:
                _write_all(descriptor, data, block.offset)
            self._journal.add(shard.name, block.offset)
            self._tick(block.length)

        with _opened(self._directory / shard.name) as descriptor:
            in_parallel(self._threads, write, blocks)

    def _differing(self, shard: Shard, blocks: Sequence[Block]) -> list[Block]:
        """Blocks that have other bytes in the file than they should."""
        wrong = list[Block]()

        def compare(block: Block, buffer: Tensor) -> None:
            written = buffer[-BLOCK_BYTES:][: block.length].numpy()
            count = os.preadv(descriptor, [written.data], block.offset)
            expected = np.frombuffer(_bytes(self._block(block, buffer[:-BLOCK_BYTES])), np.uint8)
            if count != block.length or not np.array_equal(written, expected):
                wrong.append(block)
            self._tick(block.length)

        with _opened(self._directory / shard.name) as descriptor:
            in_parallel(self._threads, compare, blocks)
        return wrong

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
    """Room for a block in any dtype, and one more as it is written.

    Blocks from malloc would be kept by its arenas, some of them for each thread.
    """
    return torch.empty((_WIDEST + 1) * BLOCK_BYTES, dtype=torch.uint8)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
