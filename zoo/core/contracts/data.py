"""Contracts of data: corpora, their records, and samples made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from zoo.core.tokenizer.tokenizer import Tokenizer


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
