"""Invertible rules between a family's weight names and the hub's: names and pieces, no files and no ranks.

A rule says of which hub tensors a tensor of ours is made, and where each of them lies in it. Reading in either
direction follows from that, so there is one truth for import and export. A name without a rule is the same on
both sides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from zoo.core.contracts import TensorSource
from zoo.core.errors import DataError

Shape = tuple[int, ...]
Index = tuple[slice, ...]

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A hub tensor and the box of ours that it fills."""

    hub: str
    start: Shape
    shape: Shape
    stacked: bool = False
    """Dim 0 of the box has length 1 and the hub has no such dim."""

    @property
    def hub_shape(self) -> Shape:
        return self.shape[1:] if self.stacked else self.shape


class Rule(Protocol):
    """How one kind of weight is made of the hub's. Patterns name atoms as `{i}`: `model.layers.{i}.mlp.w`."""

    @property
    def ours(self) -> str:
        """Pattern of the names it is about."""

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        """The hub's tensors in ours, covering `shape` exactly once. Raises DataError if they cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """One tensor, another name."""

    ours: str
    hub: str

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        return (Piece(self.hub.format(**atoms), (0,) * len(shape), shape),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Hub tensors stacked on a new dim 0. The atom of `hub` that `ours` lacks counts them from 0."""

    ours: str
    hub: str

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        counted = [name for name in _FIELD.findall(self.hub) if name not in atoms]
        if len(counted) != 1:
            raise ValueError(f"Stack({self.ours}): 'hub' must have exactly one atom that 'ours' lacks, not {counted}")
        names = (self.hub.format(**atoms, **{counted[0]: number}) for number in range(shape[0]))
        rest = (0,) * (len(shape) - 1)
        return tuple(Piece(name, (i, *rest), (1, *shape[1:]), stacked=True) for i, name in enumerate(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat:
    """Hub tensors laid end to end along `dim`; `sizes` are their lengths there."""

    ours: str
    hub: tuple[str, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        if len(self.hub) != len(self.sizes) or sum(self.sizes) != shape[self.dim]:
            raise DataError(
                f"{self.ours.format(**atoms)} has {shape[self.dim]} rows and not {' + '.join(map(str, self.sizes))}"
            )
        found, offset = [], 0
        for name, size in zip(self.hub, self.sizes, strict=True):
            start, part = [0] * len(shape), list(shape)
            start[self.dim], part[self.dim] = offset, size
            found.append(Piece(name.format(**atoms), tuple(start), tuple(part)))
            offset += size
        return tuple(found)


class RuleBook:
    """Rules applied to the shapes of one model's parameters: every hub name is used exactly once.

    Raises ValueError if two rules claim a name, a rule matches nothing, or a hub name is used twice.
    """

    def __init__(self, rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self.pieces: dict[str, tuple[Piece, ...]] = {
            name: _pieces(rules, name, shape) for name, shape in shapes.items()
        }
        idle = [rule.ours for rule in rules if all(_match(rule.ours, name) is None for name in shapes)]
        if idle:
            raise ValueError(f"rule {idle[0]} matches no parameter")

    @cached_property
    def hub(self) -> dict[str, tuple[str, Piece]]:
        """Hub name to our name and the place in it."""
        found: dict[str, tuple[str, Piece]] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                if piece.hub in found:
                    raise ValueError(f"rules take {piece.hub} twice: for {found[piece.hub][0]} and {name}")
                found[piece.hub] = name, piece
        return found

    @cached_property
    def hub_shapes(self) -> dict[str, Shape]:
        return {name: piece.hub_shape for name, (_, piece) in self.hub.items()}

    def to_ours(self, source: TensorSource) -> TensorSource:
        """A source in hub names, seen in our names."""
        return _Ours(self, source)

    def to_hub(self, source: TensorSource) -> TensorSource:
        """A source in our names, seen in hub names."""
        return _Hub(self, source)


@dataclass(frozen=True)
class _Ours:
    book: RuleBook
    source: TensorSource

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> Collection[str]:
        return self.book.shapes.keys()

    def shape(self, name: str) -> Shape:
        return self.book.shapes[name]

    def dtype(self, name: str) -> str:
        return self.source.dtype(self.book.pieces[name][0].hub)

    def read(self, name: str, index: Index) -> Tensor:
        pieces = self.book.pieces[name]
        if len(pieces) == 1 and not pieces[0].stacked:
            return self.source.read(pieces[0].hub, index)
        out = torch.empty([part.stop - part.start for part in index], dtype=getattr(torch, self.dtype(name)))
        for piece in pieces:
            common = _common(piece, index)
            if common is not None:
                there, here = common
                part = self.source.read(piece.hub, there[1:] if piece.stacked else there)
                out[here] = part[None] if piece.stacked else part
        return out


@dataclass(frozen=True)
class _Hub:
    book: RuleBook
    source: TensorSource

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> Collection[str]:
        return self.book.hub.keys()

    def shape(self, name: str) -> Shape:
        return self.book.hub_shapes[name]

    def dtype(self, name: str) -> str:
        return self.source.dtype(self.book.hub[name][0])

    def read(self, name: str, index: Index) -> Tensor:
        ours, piece = self.book.hub[name]
        boxed = (slice(0, 1), *index) if piece.stacked else index
        moved = tuple(slice(s + part.start, s + part.stop) for s, part in zip(piece.start, boxed, strict=True))
        tensor = self.source.read(ours, moved)
        return tensor[0] if piece.stacked else tensor


def whole(shape: Shape) -> Index:
    """The index of an entire tensor."""
    return tuple(slice(0, size) for size in shape)


def row_blocks(index: Index, *, values: int) -> Iterator[Index]:
    """Cut an index along dim 0 into pieces of at most about so many values, at least one row each."""
    if not index:
        yield index
        return
    row = max(1, _size(index[1:]))
    step = max(1, values // row)
    for start in range(index[0].start, index[0].stop, step):
        yield (slice(start, min(start + step, index[0].stop)), *index[1:])


def _size(index: Index) -> int:
    size = 1
    for part in index:
        size *= part.stop - part.start
    return size


def _pieces(rules: Sequence[Rule], name: str, shape: Shape) -> tuple[Piece, ...]:
    found = [(rule, atoms) for rule in rules if (atoms := _match(rule.ours, name)) is not None]
    if len(found) > 1:
        raise ValueError(f"rules {' and '.join(rule.ours for rule, _ in found)} both match {name}")
    if not found:
        return (Piece(name, (0,) * len(shape), shape),)
    rule, atoms = found[0]
    return rule.pieces(atoms, shape)


def _match(pattern: str, name: str) -> dict[str, str] | None:
    """The atoms of a name by the pattern's fields, None if it does not match."""
    parts = _FIELD.split(pattern)
    regex = "".join(f"(?P<{part}>[^.]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    found = re.fullmatch(regex, name)
    return found.groupdict() if found else None


def _common(piece: Piece, index: Index) -> tuple[Index, Index] | None:
    """Where a piece and an index of ours meet: seen from the piece, and from the index; None if nowhere."""
    there, here = [], []
    for start, size, part in zip(piece.start, piece.shape, index, strict=True):
        low, high = max(start, part.start), min(start + size, part.stop)
        if low >= high:
            return None
        there.append(slice(low - start, high - start))
        here.append(slice(low - part.start, high - part.start))
    return tuple(there), tuple(here)
