"""Which rank owns which tokens of a row. Positions, labels, documents and plans all derive from this one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.sequence.ranges import Ranges, RowIndex, count, union


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """A row of `length` tokens cut into chunks; `chunks[rank]` are that rank's, ascending.

    A rank holds its chunks one after another, in order of position. Chunks of all ranks together cover the row
    exactly once; raises UsageError if they do not.
    """

    length: int
    chunks: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        owned = sorted(part for parts in self.chunks for part in parts)
        edges = [(0, 0), *owned, (self.length, self.length)]
        ascending = all(parts == tuple(sorted(parts)) for parts in self.chunks)
        if not ascending or any(a >= b for a, b in owned) or any(a[1] != b[0] for a, b in pairwise(edges)):
            raise UsageError(
                f"a layout must cover {self.length} tokens exactly once, each rank's chunks ascending, and does not: "
                f"{self.chunks}"
            )

    @classmethod
    def contiguous(cls, length: int, degree: int) -> SequenceLayout:
        """Rank r owns the r-th of `degree` equal parts."""
        return cls(length, tuple(union([part]) for part in _split(length, degree)))

    @classmethod
    def head_tail(cls, length: int, degree: int) -> SequenceLayout:
        """Rank r owns parts r and 2P-1-r of 2P (zigzag), so that causal work is the same on every rank.

        Parts are `[i*length//2P, (i+1)*length//2P)`: any length works, and balance is exact if 2P divides it.
        """
        parts = _split(length, 2 * degree)
        return cls(length, tuple(union([parts[rank], parts[-1 - rank]]) for rank in range(degree)))

    @property
    def degree(self) -> int:
        return len(self.chunks)

    def local_length(self, rank: int) -> int:
        """Number of tokens a rank owns."""
        return count(self.chunks[rank])

    def owners(self) -> list[tuple[int, int, int]]:
        """Every chunk as `(start, stop, rank)`, in order of position."""
        return sorted((start, stop, rank) for rank, parts in enumerate(self.chunks) for start, stop in parts)

    def take(self, tensor: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's rows of a tensor that holds the whole row along `dim`, in the rank's order."""
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.chunks[rank]]
        if not parts:
            return tensor.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The inverse of `take`: the whole row from every rank's rows."""
        index = [RowIndex(parts) for parts in self.chunks]
        pieces = [
            tensors[rank].narrow(dim, index[rank].before(start), stop - start) for start, stop, rank in self.owners()
        ]
        return torch.cat(pieces, dim)


def _split(length: int, parts: int) -> Ranges:
    if parts < 1:
        raise UsageError(f"a layout needs at least one rank, not {parts}")
    return tuple((i * length // parts, (i + 1) * length // parts) for i in range(parts))
