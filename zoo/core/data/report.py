"""A corpus counted without training on it: formats, lengths, what is trained, and what could not be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from zoo.core.contracts.data import DataSource, Record
from zoo.core.data.corpus import read_shard
from zoo.core.data.remarks import Remarks
from zoo.core.data.samples import Samples
from zoo.core.errors import DataError

SHOWN = 5
"""Problems of a kind that are kept with their place; the rest are counted."""


@dataclass(slots=True, kw_only=True)
class Problems:
    """Samples of one kind of trouble: how many, and where the first are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(line)


@dataclass(slots=True, kw_only=True)
class Survey:
    """What a corpus holds. Its size does not grow with the corpus."""

    formats: Counter[str] = field(default_factory=Counter)
    """Samples of each data format."""
    tokens: int = 0
    trained_tokens: int = 0
    blank: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Samples by length: key n counts those of at most 2 ** n tokens and more than half of that."""
    broken: Problems = field(default_factory=Problems)
    """Lines and samples that cannot be read."""
    untrained: Problems = field(default_factory=Problems)
    remarks: Remarks = field(default_factory=Remarks)
    """What is odd and trained all the same."""
    overlong: Problems = field(default_factory=Problems)
    """Longer than a row; an error in training only if nothing was said of them."""

    @property
    def samples(self) -> int:
        return self.formats.total()


def survey(source: DataSource, samples: Samples, *, seq: int) -> Survey:
    """Read every record of a corpus once, as training would. What is broken is collected, not raised."""
    found = Survey()
    for record in records(source, found.broken):
        try:
            _count(found, record, samples, seq)
        except DataError as error:
            found.broken.add(str(error))
    return found


def records(source: DataSource, broken: Problems) -> Iterator[Record]:
    """The records of a corpus in file order; a part that breaks off is noted and the next one follows."""
    for shard in source.shards():
        try:
            for record, _ in read_shard(source, shard, 0):
                yield record
        except DataError as error:
            broken.add(str(error))


def _count(found: Survey, record: Record, samples: Samples, seq: int) -> None:
    document = samples(record)
    length = len(document.tokens)
    found.formats[samples.format_of(record)] += 1
    found.remarks += Remarks.of(record.where, document.remarks)
    if not length:
        found.blank += 1
        return
    found.tokens += length
    found.trained_tokens += document.num_trained
    found.longest = max(found.longest, length)
    found.lengths[(length - 1).bit_length()] += 1
    if not document.num_trained:
        found.untrained.add(f"{record.where}")
    if length > seq:
        found.overlong.add(f"{record.where} ({length:,} tokens)")
