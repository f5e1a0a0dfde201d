"""Contracts of weights: tensors that are read piece by piece, and rules that say which pieces another form has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of ours and the hub tensor, or the box of one, that fills it."""

    hub: str
    start: Shape
    shape: Shape
    stacked: bool = False
    """Dim 0 of the box has length 1 and the hub has no such dim."""
    within: tuple[Shape, Shape] | None = None
    """Where the box starts in the hub tensor, and that tensor's shape; None if it is all of it."""

    @property
    def extent(self) -> Shape:
        """The box's shape as the hub sees it."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hub_start(self) -> Shape:
        return (0,) * len(self.extent) if self.within is None else self.within[0]

    @property
    def hub_shape(self) -> Shape:
        """Of the whole hub tensor."""
        return self.extent if self.within is None else self.within[1]

    def of_ours(self, index: Index) -> tuple[Index, Index] | None:
        """Where an index of ours meets the box: seen from that index, and in the hub tensor; None if nowhere."""
        common = common_part(self.start, self.shape, index)
        if common is None:
            return None
        here, there = common
        return here, moved(there[1:] if self.stacked else there, self.hub_start)

    def of_hub(self, index: Index) -> tuple[Index, Index] | None:
        """Where an index of the hub tensor meets the box: seen from that index, and in ours; None if nowhere."""
        common = common_part(self.hub_start, self.extent, index)
        if common is None:
            return None
        here, there = common
        return here, moved((slice(0, 1), *there) if self.stacked else there, self.start)


class Rule(Protocol):
    """How one kind of weight is made of the hub's. Patterns name atoms as `{i}`: `model.layers.{i}.mlp.w`."""

    @property
    def ours(self) -> str:
        """Pattern of the names it is about."""

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        """The hub's tensors in ours, covering `shape` exactly once. Raises DataError if they cannot."""


def moved(index: Index, by: Shape) -> Index:
    """Return an index whose every part begins so much later."""
    return tuple(slice(part.start + offset, part.stop + offset) for part, offset in zip(index, by, strict=True))


def common_part(box: Shape, size: Shape, index: Index) -> tuple[Index, Index] | None:
    """Where a box (start and size) and an index meet: seen from the index, and from the box; None if nowhere."""
    here, there = [], []
    for start, length, part in zip(box, size, index, strict=True):
        low, high = max(start, part.start), min(start + length, part.stop)
        if low >= high:
            return None
        here.append(slice(low - part.start, high - part.start))
        there.append(slice(low - start, high - start))
    return tuple(here), tuple(there)


# Checkpoints --------------------------------------------------------------------------------------


class TensorSource(Protocol):
    """Named tensors somewhere, read piece by piece."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """torch's name of the stored dtype: `bfloat16`."""

    def read(self, name: str, index: tuple[slice, ...], buffer: Tensor | None = None) -> Tensor:
        """A piece of one tensor, in its stored dtype. Slices have step 1 and lie inside the shape.

        `buffer` is bytes `[N]` that the piece may be put into; without, or where it is too small, a source finds room
        itself. Several threads may read at once.
        """

    def fingerprint(self) -> str:
        """Of the files it reads; empty where there are none. An interrupted conversion goes on from the same only."""
