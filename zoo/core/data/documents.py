"""From documents to rows: what happens to a document longer than a row, which go into which row, what is trained."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from zoo.core.contracts.batch import IGNORE, Row
from zoo.core.contracts.data import Remark

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Bools: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

Overlong: TypeAlias = Literal["error", "split", "truncate", "drop"]
OVERLONG: tuple[Overlong, ...] = get_args(Overlong)
"""What may be done with a sample longer than a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A sample as token ids, before it is cut."""

    tokens: Ints
    trained: Bools
    """Which tokens are targets. The first never is: nothing comes before it."""
    overlong: Overlong
    """What to do if it is longer than a row."""
    where: object
    """Its str() is the place it was read from."""
    remarks: tuple[Remark, ...] = ()

    @property
    def num_trained(self) -> int:
        return int(self.trained[1:].sum())


Address: TypeAlias = tuple[int, int, int]
"""Where a piece can be read again: position of the shard in the epoch's order, offset in it, number of the piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A document, or a part of one that was too long: at most a row's tokens, and their labels."""

    tokens: Ints
    labels: Ints
    address: Address

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        return int((self.labels != IGNORE).sum())


def shifted_labels(tokens: Ints, trained: Bools) -> Ints:
    """The label of token i is token i + 1 where that is trained, else IGNORE; so is the last, which has no next."""
    labels = np.full(len(tokens), IGNORE, dtype=np.int32)
    labels[:-1] = np.where(trained[1:], tokens[1:], IGNORE)
    return labels


def pieces(document: Document, seq: int, *, shard: int, offset: int) -> Iterator[Piece]:
    """Cut a document into pieces of at most `seq` tokens; `truncate` and `drop` keep the first and nothing.

    A piece is a document of its own: its first token is the label of none. One without a label would train nothing,
    and whole rows of such pieces could fill a step, so it is left out. The others keep their numbers.
    """
    length = len(document.tokens)
    if length > seq:
        length = {"split": length, "truncate": seq, "drop": 0}[document.overlong]
    for number, start in enumerate(range(0, length, seq)):
        stop = min(start + seq, length)
        tokens, trained = document.tokens[start:stop], document.trained[start:stop]
        if trained[1:].any():
            yield Piece(tokens=tokens, labels=shifted_labels(tokens, trained), address=(shard, offset, number))


def best_fit_decreasing(lengths: Sequence[int], seq: int) -> list[list[int]]:
    """Which lengths share a bin of `seq`: the longest first, each into the fullest bin that still holds it.

    Equal lengths keep their order. Every length is between 1 and `seq`.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[index], 0))
        if at == len(free):
            bins.append([])
            room, chosen = seq, len(bins) - 1
        else:
            room, chosen = free.pop(at)
        bins[chosen].append(index)
        if room > lengths[index]:
            insort(free, (room - lengths[index], chosen))
    return bins


def row_of(parts: Sequence[Piece], *, seq: int, pad: int) -> Row:
    """Pieces laid end to end, each a document of its own; what is left of `seq` tokens is padding."""
    tokens = np.full(seq, pad, dtype=np.int64)
    labels = np.full(seq, IGNORE, dtype=np.int64)
    documents = []
    at = 0
    for part in parts:
        tokens[at : at + len(part)] = part.tokens
        labels[at : at + len(part)] = part.labels
        documents.append((at, at + len(part)))
        at += len(part)
    return Row(tokens=tokens, labels=labels, documents=tuple(documents))
