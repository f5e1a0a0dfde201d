"""Contracts of checkpoints in other people's forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from zoo.core.contracts.models import ModelSpec
    from zoo.core.contracts.weights import TensorSource
    from zoo.core.storage.checksums import Checksums


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A checkpoint directory in somebody's published form, opened and checked, no tensor read yet."""

    path: Path
    config: Mapping[str, Any]
    """config.json's fields."""
    tensors: TensorSource
    files: tuple[str, ...]
    """Other files that belong to it (tokenizer, templates), by name."""
    own_names: bool = False
    """Whether the tensors are under the family's own names already, as in a run, so that its rules do not apply."""
    checksums: Checksums | None = None
    """Of its files, if whoever wrote it left any. Names, lengths and small files have been compared, weights not."""


class Converter(Protocol):
    """Checkpoints of one form, in and out, streaming: never more than a few tensors in memory."""

    name: str

    def locate(self, source: str) -> Path | None:
        """The local directory a hub id or path means, fetched if need be; None if it is not of this form.

        Raises DataError if it is of this form and cannot be had.
        """

    def open(self, path: Path) -> HubCheckpoint:
        """Check the directory and open it. Raises DataError naming file, tensor and rule."""

    def export(
        self,
        spec: ModelSpec,
        config: Any,
        tensors: TensorSource,
        out: Path,
        *,
        files: Mapping[str, Path],
        dtype: str | None,
        shard_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Write a directory of that form from tensors under the family's own names; re-open and verify it.

        `files` are copied byte for byte, except `config.json`, which is the base of the one written. Raises DataError.
        """
