"""Windows of the row stream: which documents are packed together, and where the next window begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

from zoo.core.contracts.data import DataSource, Record
from zoo.core.data.corpus import Corpus, Found, Place, read_shard, shuffled
from zoo.core.data.documents import Address, Document, Piece, best_fit_decreasing, pieces
from zoo.core.data.remarks import Remarks
from zoo.core.data.samples import LOSS_ON
from zoo.core.errors import DataError

WINDOW_ROWS = 8
WINDOW_TOKENS = 1 << 18
"""Documents are packed in windows of at least this many rows and tokens: more fills rows better, and takes memory."""

_CHECKED_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What became of the samples read so far, window by window."""

    samples: int = 0
    """Samples read, whatever became of them."""
    rows: int = 0
    tokens: int = 0
    """Tokens in rows, padding left out."""
    trained_tokens: int = 0
    split: int = 0
    """Samples longer than a row that were cut into several documents."""
    truncated: int = 0
    """Samples longer than a row whose tail was left out."""
    dropped: int = 0
    """Samples longer than a row that were left out, or had nothing trained in the part that fits."""
    blank: int = 0
    """Samples without any text, left out."""
    unlabelled: int = 0
    """Pieces of split samples in which nothing is trained, left out."""
    remarks: Remarks = field(default_factory=Remarks)

    def __add__(self, other: Stats) -> Stats:
        return Stats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def fill(self, seq: int) -> float:
        """Share of the rows that is not padding; 0 before the first row."""
        return self.tokens / (self.rows * seq) if self.rows else 0.0

    def as_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"remarks": self.remarks.as_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stats:
        return cls(**{**value, "remarks": Remarks.from_json(value["remarks"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a window begins. Everything in the window follows from it."""

    epoch: int = 0
    window: int = 0
    """Number of the window in its epoch."""
    place: Place = Place(0, 0)  # noqa: RUF009 - frozen
    carried: tuple[Address, ...] = ()
    """Pieces of earlier windows of the epoch that are still to be packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Packed rows, and where the next window begins."""

    rows: tuple[tuple[Piece, ...], ...]
    stats: Stats
    next: Cursor
    carried: tuple[Piece, ...]
    """The pieces of `next.carried`, to spare reading them again."""


class Packer:
    """Builds the window of a cursor: nothing but cursor, corpus, seed and `seq` decides what is in it."""

    def __init__(
        self,
        source: DataSource,
        to_document: Callable[[Record], Document],
        *,
        seq: int,
        seed: int,
        name: str = "",
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """`asked` has what was said of `loss-on` and `overlong`, so that no error advises the same again."""
        self._asked = dict(asked or {})
        self.corpus = Corpus(source, seed=seed, name=name)
        self.seq = seq
        self._to_document = to_document
        self._encoders = ThreadPoolExecutor(encoding_threads(), thread_name_prefix="zoo-encode")

    def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def check_first(self) -> None:
        """Read the corpus's first sample as training will. Raises DataError naming it, or saying that there is none."""
        source = self.corpus.source
        found = (record for shard in source.shards() for record, _ in read_shard(source, shard, 0))
        first = next(found, None)
        if first is None:
            raise DataError(_empty(Stats(), self.corpus, self._asked))
        # Tokens of megabytes of plain text take seconds, and there is little in it that could be refused.
        if sum(len(value) for value in first.fields.values() if isinstance(value, str)) <= _CHECKED_CHARACTERS:
            self._to_document(first)

    def build(self, cursor: Cursor, carried: Sequence[Piece] | None = None) -> Window:
        """The window that begins at a cursor; `carried` are its carried pieces if they are at hand.

        It has a row at least: only an epoch without usable samples has none, and that raises DataError. The emptiest
        row is not in it but goes on into the next window, unless the epoch ends.
        """
        parts = list(self._read_again(cursor) if carried is None else carried)
        stats, place, tokens = Stats(), cursor.place, sum(map(len, parts))
        more = False
        for block in self.corpus.blocks(cursor.epoch, cursor.place):
            read, counts = self._pieces(block)
            parts += read
            stats += counts
            place, tokens = block[-1].after, tokens + sum(map(len, read))
            more = tokens >= max(WINDOW_ROWS * self.seq, WINDOW_TOKENS)
            if more:
                break
        if not parts:
            raise DataError(_empty(stats, self.corpus, self._asked))
        bins = self._packed(parts, cursor)
        left = bins.pop() if more else ()
        rows = tuple(bins[i] for i in shuffled(len(bins), self.corpus.seed, cursor.epoch, cursor.window, 1))
        ahead = Cursor(
            epoch=cursor.epoch, window=cursor.window + 1, place=place, carried=tuple(part.address for part in left)
        )
        following = ahead if more else Cursor(epoch=cursor.epoch + 1)
        return Window(rows=rows, stats=stats + _packed_counts(rows), next=following, carried=left)

    def _packed(self, parts: Sequence[Piece], cursor: Cursor) -> list[tuple[Piece, ...]]:
        """Pieces in bins of a row each, the emptiest last."""
        mixed = [parts[i] for i in shuffled(len(parts), self.corpus.seed, cursor.epoch, cursor.window, 0)]
        bins = [tuple(mixed[i] for i in bin) for bin in best_fit_decreasing([len(part) for part in mixed], self.seq)]
        return sorted(bins, key=lambda bin: -sum(map(len, bin)))

    def _pieces(self, block: Sequence[Found]) -> tuple[list[Piece], Stats]:
        documents = list(self._encoders.map(self._to_document, [found.record for found in block]))
        _check(documents, self.seq, self._asked)
        read, counts = [], Stats(samples=len(block))
        for found, document in zip(block, documents, strict=True):
            cut, count = _cut(document, self.seq, found.at)
            read += cut
            counts += replace(count, remarks=Remarks.of(document.where, document.remarks))
        return read, counts

    def _read_again(self, cursor: Cursor) -> Iterable[Piece]:
        for shard, offset, number in cursor.carried:
            place = Place(shard, offset)
            record = self.corpus.at(cursor.epoch, place)
            cut = [] if record is None else _cut(self._to_document(record), self.seq, place)[0]
            piece = next((piece for piece in cut if piece.address[2] == number), None)
            if piece is None:
                raise DataError("the corpus has changed since the checkpoint: a sample that was read is not there")
            yield piece


def encoding_threads() -> int:
    """How many threads turn text into tokens: at most 4, one if TOKENIZERS_PARALLELISM says no."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no", "f", "n"):
        return 1
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# Counting and refusing ----------------------------------------------------------------------------


def _cut(document: Document, seq: int, place: Place) -> tuple[list[Piece], Stats]:
    cut = list(pieces(document, seq, shard=place.shard, offset=place.offset))
    if not len(document.tokens):
        return cut, Stats(blank=1)
    if len(document.tokens) <= seq:
        return cut, Stats()
    if document.overlong == "split":
        return cut, Stats(split=1, unlabelled=-(-len(document.tokens) // seq) - len(cut))
    # What is left of a truncated conversation may hold no answer at all.
    return cut, Stats(truncated=1) if cut else Stats(dropped=1)


def _packed_counts(rows: Sequence[Sequence[Piece]]) -> Stats:
    parts = [part for row in rows for part in row]
    return Stats(rows=len(rows), tokens=sum(map(len, parts)), trained_tokens=sum(part.num_trained for part in parts))


def _check(documents: Sequence[Document], seq: int, asked: Mapping[str, Any]) -> None:
    """Raise DataError for documents with nothing trained, and for those that must not be longer than a row."""
    untrained = [document for document in documents if len(document.tokens) and not document.num_trained]
    if untrained:
        said = [remark.kind for document in untrained for remark in document.remarks[:1]]
        raise DataError(
            f"{_some(untrained)}: nothing in it is trained{f' ({said[0]})' if said else ''}; "
            f"{_others('type another --loss-on', LOSS_ON, asked.get('loss-on'), most='all')}take such samples out"
        )
    overlong = [document for document in documents if len(document.tokens) > seq and document.overlong == "error"]
    if overlong:
        raise DataError(
            f"{_some(overlong)}: longer than a row of {seq:,} tokens; type --overlong split, truncate or drop, "
            "or a larger --seq"
        )


def _others(said: str, words: Sequence[str], given: Any, *, most: str) -> str:
    """Advice to type another word than the one given; none if no other could do more than that."""
    if given == most:
        return ""
    return f"{said} ({', '.join(word for word in words if word != given)}), or "


def _some(documents: Sequence[Document]) -> str:
    named = ", ".join(f"{document.where} ({len(document.tokens):,} tokens)" for document in documents[:5])
    return named if len(documents) <= 5 else f"{named} and {len(documents) - 5} more in this part of the corpus"


def _empty(stats: Stats, corpus: Corpus, asked: Mapping[str, Any]) -> str:
    if not stats.samples:
        return f"--data {corpus.name} has no samples ({corpus.source.fingerprint}); give something with text in it"
    return (
        f"--data {corpus.name}: no sample is left: of {stats.samples:,}, {stats.blank:,} are blank and "
        f"{stats.dropped + stats.split:,} longer than a row, without a label in what fits; type "
        f"{_others('another --overlong', ('truncate', 'split'), asked.get('overlong'), most='split')}a larger --seq"
    )
