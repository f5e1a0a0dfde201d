"""Contracts of what comes in and goes out: checkpoints of other people's forms, samples, corpora, metrics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zoo.core.checksums import Checksums
    from zoo.core.contracts import ModelSpec
    from zoo.core.tokenizer import Tokenizer

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


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remark:
    """Something odd about a sample that is trained all the same. It is counted, and said before the first step."""

    kind: str
    """What is counted, in the words that are printed: `turns whose reasoning the chat template leaves out`."""
    place: str = ""
    """Where in the record: `message 2`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: token ids, and for each whether it is a target of training."""

    tokens: Sequence[int]
    trained: Sequence[bool]
    remarks: Sequence[Remark] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One raw sample as read, and where it came from."""

    fields: Mapping[str, Any]
    where: object
    """Its str() is the place: `train.jsonl:17`. Not a str itself, because counting lines is work for error messages."""


class DataFormat(Protocol):
    """From a record to a sample."""

    def __call__(self, record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
        """Raises DataError naming `record.where`."""


class DataSource(Protocol):
    """Records of a corpus in a fixed order, in pieces that can be re-read from any position."""

    @property
    def fingerprint(self) -> str:
        """Changes when the corpus does; a resumed run compares it."""

    def shards(self) -> Sequence[str]:
        """Names of the parts (files). Their number is all that may be held in memory."""

    def read(self, shard: str, offset: int) -> Iterator[tuple[Record, int]]:
        """Records of a part from an offset that `read` returned before (0 is the start), each with the next offset."""


# Observers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run, as observers see it. Rank 0 only."""

    path: Path
    model: str
    size: str
    steps: int
    first_step: int
    world_size: int
    config: Mapping[str, Any]
    """The resolved job."""


class Tracker(Protocol):
    """A metrics sink."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step; `loss` and `grad_norm` are not among them if no token of it was trained."""

    def close(self) -> None: ...
