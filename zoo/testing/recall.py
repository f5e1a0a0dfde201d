"""Needles in text: rows that hide `marker key v1 v2` and ask for it at their end, and the share that a model finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from zoo import DataError

MARKER = "<|key|>"
NUMBERS = tuple(f"{n:03d}" for n in range(1000))
NEEDLE_LENGTH = 4
"""Tokens of `marker key v1 v2`, as a needle and again as a question with its answer."""

Ids = np.ndarray[Any, np.dtype[np.int64]]


class TokenIds(Protocol):
    """What is asked of a tokenizer: `tokenizers.Tokenizer` has it."""

    def token_to_id(self, token: str) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleTokens:
    """The token ids that needles are made of."""

    marker: int
    numbers: Ids

    @classmethod
    def of(cls, tokenizer: TokenIds) -> Self:
        """Look them up. Raises DataError if the tokenizer has no marker or splits a three-digit number."""
        ids = [tokenizer.token_to_id(token) for token in (MARKER, *NUMBERS)]
        missing = [token for token, each in zip((MARKER, *NUMBERS), ids, strict=True) if each is None]
        if missing:
            raise DataError(
                f"the tokenizer has no token '{missing[0]}', and needles are made of '{MARKER}' and one-token numbers "
                "000 to 999; use the embedded tiny checkpoint's tokenizer.json"
            )
        return cls(marker=ids[0] or 0, numbers=np.array(ids[1:], dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallRow:
    """A row of text with needles and, at its end, a question for each."""

    tokens: Ids
    """[T]"""
    answers: Ids
    """[needles]: where each question's first answer token is; the second follows it."""
    depths: Ids
    """[needles]: where the needle that answers it starts."""


def needle_row(
    text: Ids, *, length: int, num_needles: int, vocabulary: NeedleTokens, rng: np.random.Generator, even: bool = True
) -> RecallRow:
    """Hide needles in the first tokens of `text` and ask for all of them at the end, in random order.

    Needles lie at even depths from the first token to the last, or at random ones. All numbers of a row differ
    from each other and from those of its text, so that every question has one answer. Raises DataError if `length`,
    `text` or the numbers do not suffice.
    """
    filler = text[: length - 2 * NEEDLE_LENGTH * num_needles]
    spare = np.setdiff1d(vocabulary.numbers, filler)
    if len(filler) != length - 2 * NEEDLE_LENGTH * num_needles or len(filler) < 2:
        raise DataError(f"{num_needles} needles in {length} tokens do not fit {len(text)} tokens of text; hide fewer")
    if len(spare) < 3 * num_needles:
        raise DataError(f"{num_needles} needles take {3 * num_needles} unused numbers, {len(spare)} left; hide fewer")
    facts = rng.permutation(spare)[: 3 * num_needles].reshape(num_needles, 3)
    needles = np.concatenate([np.full((num_needles, 1), vocabulary.marker), facts], axis=1)
    places = _places(len(filler), num_needles, rng, even=even)
    hidden = np.insert(filler, np.repeat(places, NEEDLE_LENGTH), needles.ravel())
    order = rng.permutation(num_needles)
    return RecallRow(
        tokens=np.concatenate([hidden, needles[order].ravel()]),
        answers=len(hidden) + NEEDLE_LENGTH * np.arange(num_needles) + 2,
        depths=(places + NEEDLE_LENGTH * np.arange(num_needles))[order],
    )


def _places(length: int, count: int, rng: np.random.Generator, *, even: bool) -> Ids:
    if even:
        return np.linspace(1, length, count).astype(np.int64)
    return np.sort(rng.integers(1, length + 1, count))


@torch.no_grad()
def found(logits: Callable[[Tensor], Tensor], row: RecallRow) -> Tensor:
    """[needles] of bool: both answer tokens are the most likely ones, each given all true tokens before it.

    `logits` takes tokens [1, T] to logits [1, T, V].
    """
    tokens, answers = torch.from_numpy(row.tokens), torch.from_numpy(row.answers)
    asked = torch.stack([answers, answers + 1], dim=1)
    best = logits(tokens[None])[0, asked - 1].argmax(-1)
    return (best == tokens[asked]).all(1)


def recall(logits: Callable[[Tensor], Tensor], rows: Iterable[RecallRow]) -> float:
    """Share of all needles found, from 0 to 1."""
    return torch.cat([found(logits, row) for row in rows]).float().mean().item()
