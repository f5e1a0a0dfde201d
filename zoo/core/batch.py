"""A microbatch on its way to the model, and the row of packed documents it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

from zoo.core.attention.mask import Mask
from zoo.core.contracts import IGNORE, PADDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`seq` tokens of packed documents on the host. Labels are shifted already, so any cut of the row stays right."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    documents: tuple[tuple[int, int], ...]
    """Ascending, disjoint ranges. What lies outside all of them is padding: it sees nothing and trains nothing."""

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def document_tokens(self) -> int:
        """Those that are no padding."""
        return sum(stop - start for start, stop in self.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a model is called with. `mask` belongs to the attention seam; nobody else looks into it."""

    tokens: Tensor
    """[1, T] int64"""
    labels: Tensor
    """[1, T] int64, IGNORE where nothing is trained"""
    positions: Tensor
    """[1, T] int64, restarting at each document, PADDING outside of all"""
    mask: Any
    num_rows: int = 1
    """Rows laid end to end in it."""
    document_tokens: int = 0
    """Tokens of these rows, on all ranks that share them, that are no padding."""

    def to(self, device: torch.device) -> Batch:
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            mask=self.mask,
            num_rows=self.num_rows,
            document_tokens=self.document_tokens,
        )


MASKS = ("causal", "prefix", "full")
"""What a token sees of its document: those before it, the prompt too, everything."""


def row_mask(length: int, documents: tuple[tuple[int, int], ...], labels: np.ndarray[Any, Any], kind: str) -> Mask:
    """The mask of a row of one of `MASKS`.

    A prompt is what lies before the first token that is trained on; a document without one is all prompt.
    """
    if kind != "prefix":
        return Mask(length, documents, causal=kind == "causal")
    return Mask(length, documents, prefixes=tuple(_prompt(labels[start:stop]) for start, stop in documents))


def _prompt(labels: np.ndarray[Any, Any]) -> int:
    """Tokens before the first trained one. It is the label of the token before it."""
    trained = np.flatnonzero(labels != IGNORE)
    return int(trained[0]) + 1 if len(trained) else len(labels)


def collate(rows: Sequence[Row], *, mask: str = "causal") -> Batch:
    """Rows laid end to end as one: documents never see each other, so this is the same function as a batch of rows."""
    tokens = np.concatenate([row.tokens for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    positions = np.full_like(tokens, PADDING)
    documents: list[tuple[int, int]] = []
    offset = 0
    for row in rows:
        for start, stop in row.documents:
            documents.append((offset + start, offset + stop))
            positions[offset + start : offset + stop] = np.arange(stop - start)
        offset += len(row.tokens)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        positions=torch.from_numpy(positions)[None],
        mask=row_mask(offset, tuple(documents), labels, mask),
        num_rows=len(rows),
        document_tokens=sum(row.document_tokens for row in rows),
    )
