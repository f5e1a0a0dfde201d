"""Invertible rules between a family's weight names and the hub's: names and pieces, no files and no ranks.

A rule says of which hub tensors a tensor of ours is made, and where each of them lies in it. Reading in either
direction follows from that, so there is one truth for import and export. A name without a rule is the same on
both sides.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zoo.core.contracts.weights import Index, Piece, Rule, Shape, TensorSource, common_part, moved
from zoo.core.errors import DataError

_FIELD = re.compile(r"\{(\w+)\}")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a larger hub tensor: rows `start` and on along `dim`, of `total` there.

    `gate_up_proj [E, 2I, D]` holds `w1` at 0 and `w3` at I along dim 1. Other rules must fill the rest.
    """

    ours: str
    hub: str
    dim: int
    start: int
    total: int

    def pieces(self, atoms: Mapping[str, str], shape: Shape) -> tuple[Piece, ...]:
        if self.start + shape[self.dim] > self.total:
            raise DataError(
                f"{self.ours.format(**atoms)} has {shape[self.dim]} rows, which do not fit into {self.total} at "
                f"{self.start}"
            )
        start, full = [0] * len(shape), list(shape)
        start[self.dim], full[self.dim] = self.start, self.total
        within = tuple(start), tuple(full)
        return (Piece(self.hub.format(**atoms), (0,) * len(shape), shape, within=within),)


class RuleBook:
    """Rules applied to the shapes of one model's parameters: every hub tensor is used exactly once.

    Raises ValueError if two rules claim a name, a rule matches nothing, or a part of a hub tensor is used twice or
    not at all.
    """

    def __init__(self, rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> None:
        self.rules = rules
        self.shapes = dict(shapes)
        self.pieces: dict[str, tuple[Piece, ...]] = {
            name: _pieces(rules, name, shape) for name, shape in shapes.items()
        }
        idle = [rule.ours for rule in rules if all(_match(rule.ours, name) is None for name in shapes)]
        if idle:
            raise ValueError(f"rule {idle[0]} matches no parameter")

    @cached_property
    def hub(self) -> dict[str, tuple[tuple[str, Piece], ...]]:
        """Hub name to our names and the places in them, which together hold all of it."""
        found: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                found.setdefault(piece.hub, []).append((name, piece))
        for hub, places in found.items():
            check_cover(hub, places)
        return {hub: tuple(places) for hub, places in found.items()}

    @cached_property
    def hub_shapes(self) -> dict[str, Shape]:
        return {name: places[0][1].hub_shape for name, places in self.hub.items()}

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

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def dtype(self, name: str) -> str:
        return _common_dtype({self.source.dtype(piece.hub) for piece in self.book.pieces[name]})

    def read(self, name: str, index: Index, buffer: Tensor | None = None) -> Tensor:
        pieces = self.book.pieces[name]
        if len(pieces) == 1 and not pieces[0].stacked:
            return self.source.read(pieces[0].hub, moved(index, pieces[0].hub_start), buffer)
        meeting = [(piece, common) for piece in pieces if (common := piece.of_ours(index))]
        if len(meeting) == 1 and self.dtype(name) == self.source.dtype(meeting[0][0].hub):
            return self.source.read(meeting[0][0].hub, meeting[0][1][1], buffer).reshape(_extent(index))
        out = torch.empty(_extent(index), dtype=getattr(torch, self.dtype(name)))
        for piece, (here, there) in meeting:
            out[here] = self.source.read(piece.hub, there).view(out[here].shape)
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

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def dtype(self, name: str) -> str:
        return _common_dtype({self.source.dtype(ours) for ours, _ in self.book.hub[name]})

    def read(self, name: str, index: Index, buffer: Tensor | None = None) -> Tensor:
        places = self.book.hub[name]
        if len(places) == 1 and (common := places[0][1].of_hub(index)):
            return self.source.read(places[0][0], common[1], buffer).reshape(_extent(index))
        out = torch.empty(_extent(index), dtype=getattr(torch, self.dtype(name)))
        for ours, piece in places:
            if common := piece.of_hub(index):
                here, there = common
                out[here] = self.source.read(ours, there).view(out[here].shape)
        return out


def _common_dtype(names: Collection[str]) -> str:
    """The narrowest that holds all values of all of them."""
    dtypes = (getattr(torch, name) for name in names)
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def whole(shape: Shape) -> Index:
    """The index of an entire tensor."""
    return tuple(slice(0, size) for size in shape)


def row_blocks(index: Index, *, values: int) -> Iterator[Index]:
    """Cut an index into pieces of at most so many values, each contiguous in C order, in that order."""
    if not index:
        yield index
        return
    row = math.prod(_extent(index[1:]))
    step = max(1, values // max(1, row))
    for start in range(index[0].start, index[0].stop, step):
        rows = slice(start, min(start + step, index[0].stop))
        if row > values:
            yield from ((rows, *rest) for rest in row_blocks(index[1:], values=values))
        else:
            yield (rows, *index[1:])


def _extent(index: Index) -> Shape:
    return tuple(part.stop - part.start for part in index)


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


def check_cover(hub: str, places: Sequence[tuple[str, Piece]]) -> None:
    """Boxes of a hub tensor are apart from each other and fill it. Raises ValueError."""
    boxes = [(piece.hub_start, piece.extent) for _, piece in places]
    shape = places[0][1].hub_shape
    for i, (name, piece) in enumerate(places[1:], 1):
        box = tuple(slice(start, start + size) for start, size in zip(*boxes[i], strict=True))
        for k, (other, earlier) in enumerate(places[:i]):
            if None in (piece.within, earlier.within) or common_part(*boxes[k], box) is not None:
                raise ValueError(f"rules take {hub} twice: for {other} and {name}")
        if piece.hub_shape != shape:
            raise ValueError(f"rules disagree about the shape of {hub}: {shape} and {piece.hub_shape}")
    if sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        raise ValueError(f"rules leave a part of {hub} unused")
