"""Rows of packed documents, and the microbatch made of them that a model is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


IGNORE = -100
"""Label of a token that is not trained on."""

PADDING = -1
"""Position of a token of padding: it is in no document, sees nothing, is seen by nobody and trains nothing."""


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
