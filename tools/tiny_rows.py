"""Training rows of the embedded tiny model: text, a string of numbers that comes back, needles that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zoo.testing.recall import Ids, NeedleTokens, needle_row

Kind = Literal["text", "string", "needles"]
NEEDLE_EVERY = 16
"""A training row of T tokens hides up to T / 16 needles; needles and questions are then half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """`length` tokens in, and for each the next one with its role in the loss."""

    tokens: Ids
    """[T + 1]"""
    answers: Ids
    """Indices in `tokens` of what can be known from the row alone."""
    hidden: Ids
    """Indices in `tokens` of what nobody can predict: the first sight of random numbers, and their markers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """Draws rows from documents (`bos text eos`). What it draws depends on `rng` only."""

    documents: Sequence[Ids]
    vocabulary: NeedleTokens
    rng: np.random.Generator

    def draw(self, kind: Kind, length: int) -> TrainRow:
        """One row that predicts `length` tokens."""
        if kind == "string":
            return self._string(length)
        return self._needles(length) if kind == "needles" else self._text(length)

    def stream(self, length: int) -> Ids:
        """Text of some documents end to end; half of the rows begin where a document does, half within one."""
        sizes = np.array([len(document) for document in self.documents], dtype=np.float64)
        first = self.documents[int(self.rng.choice(len(sizes), p=sizes / sizes.sum()))]
        pieces = [first if self.rng.random() < 0.5 else first[self.rng.integers(len(first) - 1) :]]
        while sum(map(len, pieces)) < length:
            pieces.append(self.documents[int(self.rng.integers(len(self.documents)))])
        return np.concatenate(pieces)[:length]

    def _text(self, length: int) -> TrainRow:
        nothing = np.empty(0, dtype=np.int64)
        return TrainRow(tokens=self.stream(length + 1), answers=nothing, hidden=nothing)

    def _string(self, length: int) -> TrainRow:
        size = int(self.rng.integers(length // 3, length * 7 // 16 + 1))
        text = self.stream(length + 1 - 2 * size)
        string = self.rng.permutation(self.vocabulary.numbers)[:size]
        first, second = np.sort(self.rng.integers(1, len(text) + 1, 2))
        tokens = np.concatenate([text[:first], string, text[first:second], string, text[second:]])
        again = second + size
        hidden = np.concatenate([first + np.arange(size), [again]])
        return TrainRow(tokens=tokens, answers=again + np.arange(1, size), hidden=hidden)

    def _needles(self, length: int) -> TrainRow:
        count = int(self.rng.integers(2, length // NEEDLE_EVERY + 1))
        text = self.stream(length + 1)
        row = needle_row(
            text, length=length + 1, num_needles=count, vocabulary=self.vocabulary, rng=self.rng, even=False
        )
        starts = np.concatenate([row.depths, row.answers - 2])
        hidden = np.concatenate([(row.depths[:, None] + np.arange(4)).ravel(), row.answers - 2, row.answers - 1])
        assert (row.tokens[starts] == self.vocabulary.marker).all()
        return TrainRow(tokens=row.tokens, answers=np.concatenate([row.answers, row.answers + 1]), hidden=hidden)
