"""Masks for FlexAttention from intervals of keys: block tables on a device, pieces of rows on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from zoo.plugins.attention.bands import Band, Launch

MAX_BLOCKS = 2048
"""Blocks along a side of a block table, which then takes 16 MiB; longer rows have larger blocks."""
_SMALLEST_BLOCK = 128

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some query rows and the key rows that hold all they see; `first` and `last` count keys from there."""

    queries: slice
    keys: slice
    first: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class Intervals:
    """The keys `[first, last)` that each of T query rows sees; both int32 `[T]`. Rows that see none have 0, 0."""

    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, launch: Launch, tokens: int) -> Intervals:
        first, last = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
        for b in launch:
            first[b.q_start : b.q_stop] = b.k_start
            last[b.q_start : b.q_stop] = b.k_stop
            if b.causal:
                last[b.q_start : b.q_stop] -= torch.arange(b.q_stop - b.q_start - 1, -1, -1, dtype=torch.int32)
        return cls(first, last)

    def pieces(self, area: int) -> tuple[Piece, ...]:
        """Runs of rows with at most `area` scores each (or one row), without those that see nothing."""
        tokens = len(self.first)
        step = max(1, area // max(1, int(self.last.max()) if tokens else 1))
        return tuple(piece for start in range(0, tokens, step) for piece in self._piece(start, start + step))

    def _piece(self, start: int, stop: int) -> Iterator[Piece]:
        first, last = self.first[start:stop], self.last[start:stop]
        seeing = last > first
        if seeing.any():
            low, high = int(first[seeing].min()), int(last.max())
            yield Piece(slice(start, start + len(first)), slice(low, high), first - low, last - low)


@lru_cache(maxsize=64)
def block_mask(launch: Launch, tokens: int, keys: int, device: torch.device) -> BlockMask:
    """The block table of a launch, made from its bands: blocks seen whole need no mask, unseen ones no work."""
    size = block_size(max(tokens, keys))
    seen, whole = (table.to(device) for table in block_tables(launch, tokens, keys, size))
    intervals = Intervals.of(launch, tokens)
    mask = _inside(intervals.first.to(device), intervals.last.to(device))
    partial_counts, partial_indices = _ordered(seen & ~whole)
    whole_counts, whole_indices = _ordered(whole)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=(size, size),
        mask_mod=mask,
        seq_lengths=(tokens, keys),
    )


def one_block(piece: Piece) -> BlockMask:
    """A single block that is masked: all that torch's plain code reads."""
    rows, keys = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
    one, index = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    mask = _inside(piece.first, piece.last)
    return BlockMask.from_kv_blocks(one, index, BLOCK_SIZE=(rows, keys), mask_mod=mask, compute_q_blocks=False)


def block_size(length: int) -> int:
    """The smallest doubling of 128 rows with which a length has no more than MAX_BLOCKS blocks."""
    size = _SMALLEST_BLOCK
    while size * MAX_BLOCKS < length:
        size *= 2
    return size


def block_tables(launch: Launch, tokens: int, keys: int, size: int) -> tuple[Tensor, Tensor]:
    """Bool `[query blocks, key blocks]` of blocks with something to see, and of those seen whole."""
    seen = torch.zeros(-(-tokens // size), -(-keys // size), dtype=torch.bool)
    whole = torch.zeros_like(seen)
    for band in launch:
        for block in range(band.q_start // size, -(-band.q_stop // size)):
            rows = max(band.q_start, block * size), min(band.q_stop, (block + 1) * size)
            seen[block, band.k_start // size : -(-_last(band, rows[1] - 1) // size)] = True
            if rows == (block * size, (block + 1) * size):
                whole[block, -(-band.k_start // size) : _last(band, rows[0]) // size] = True
    return seen, whole


def _last(band: Band, row: int) -> int:
    """Where the keys that a row of a band sees end."""
    return band.k_stop - (band.q_stop - 1 - row if band.causal else 0)


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `[1, 1, query blocks]` and, true ones first, key blocks `[1, 1, query blocks, key blocks]`."""
    counts = table.sum(-1, dtype=torch.int32)
    indices = torch.argsort(table.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def _inside(first: Tensor, last: Tensor) -> MaskFunction:
    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < last[query])

    return mask
