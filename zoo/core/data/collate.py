"""From rows to a microbatch: rows one after another, their positions, and the mask that keeps documents apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zoo.core.contracts.batch import IGNORE, PADDING, Batch, Row
from zoo.core.sequence.mask import Mask

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
