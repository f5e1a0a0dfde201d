"""The stream of rows a run trains on: endless, shuffled, packed, and resumable at any row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoo.core.contracts.batch import Row
from zoo.core.contracts.data import DataSource, Record
from zoo.core.data.corpus import Place
from zoo.core.data.documents import Document, Piece, row_of
from zoo.core.data.packing import Cursor, Packer, Stats, Window
from zoo.core.data.samples import Samples
from zoo.core.errors import DataError
from zoo.core.registry.answers import check_source

if TYPE_CHECKING:
    from zoo.core.registry.decisions import Registry
    from zoo.core.tokenizer.tokenizer import Tokenizer

VERSION = 2
"""Of the state. Another version cannot be resumed from."""


class RowStream:
    """Rows of exactly `seq` tokens, a function of corpus, seed, `seq` and options alone; not of ranks or batches.

    The next window is read and packed in a thread while the current one is trained on.
    """

    def __init__(
        self,
        source: DataSource,
        to_document: Callable[[Record], Document],
        *,
        seq: int,
        seed: int,
        pad: int = 0,
        options: Mapping[str, Any] | None = None,
        name: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        """`options` is what else decides about tokens; a resumed run must have the same. JSON values.

        `name` is what the user calls the corpus, for error messages; `notes` is what a run says before it reads rows.
        """
        self.notes = tuple(notes)
        self.seq = seq
        self._options = dict(options or {})
        self._windows = Packer(source, to_document, seq=seq, seed=seed, name=name, asked=self._options)
        self._pad = pad
        self._cursor = Cursor()
        self._row = 0
        self._before = Stats()
        self._window: Window | None = None
        self._ahead: Future[Window] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="zoo-rows")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides about rows and tokens: corpus, tokenizer, length, seed and options, as JSON."""
        corpus = self._windows.corpus
        return {"corpus": corpus.source.fingerprint, "seq": self.seq, "seed": corpus.seed, **self._options}

    @property
    def epoch(self) -> int:
        """The pass over the corpus that the last row belongs to, from 0."""
        return self._cursor.epoch

    @property
    def stats(self) -> Stats:
        """Counts over all windows begun, so they are a little ahead of the last row."""
        return self._before + (self._window.stats if self._window else Stats())

    @property
    def fill(self) -> float:
        """Share of the rows so far that is not padding."""
        return self.stats.fill(self.seq)

    def check_first(self) -> None:
        """Read the corpus's first sample as training will. Raises DataError naming it, or saying that there is none."""
        self._windows.check_first()

    def take(self, count: int) -> list[Row]:
        """The next rows. Raises DataError for samples that cannot be used and for a corpus without any."""
        return [row_of(self._next(), seq=self.seq, pad=self._pad) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row taken, as JSON: kilobytes, whatever the corpus."""
        self._before = replace(self._before, remarks=self._before.remarks.settled())
        return {
            "version": VERSION,
            "options": self.identity,
            "cursor": asdict(self._cursor),
            "row": self._row,
            "before": self._before.as_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the row another stream took last. Raises DataError naming what has changed since."""
        if state.get("version") != VERSION:
            raise DataError(
                f"the saved data position has version {state.get('version')}, this zoo reads {VERSION}; "
                "resume with the zoo that saved it, or start over with --resume never and another --out"
            )
        _check_same(state["options"], self.identity)
        saved = state["cursor"]
        self._cursor = Cursor(
            epoch=saved["epoch"],
            window=saved["window"],
            place=Place(**saved["place"]),
            carried=tuple((shard, offset, number) for shard, offset, number in saved["carried"]),
        )
        self._row = state["row"]
        self._before = Stats.from_json(state["before"])
        self._window = self._ahead = None

    def close(self) -> None:
        """Stop reading ahead. The stream cannot be used any more."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._windows.close()

    # Inside -----------------------------------------------------------------------------------------

    def _next(self) -> tuple[Piece, ...]:
        window = self._current()
        if self._row == len(window.rows):
            self._before += window.stats
            self._cursor, self._row, self._window = window.next, 0, None
            window = self._current()
        self._row += 1
        return window.rows[self._row - 1]

    def _current(self) -> Window:
        """The window of the cursor; the one after it is begun."""
        if self._window is None:
            self._window = self._ahead.result() if self._ahead is not None else self._windows.build(self._cursor)
            self._ahead = self._reader.submit(self._windows.build, self._window.next, self._window.carried)
        return self._window


def open_rows(
    registry: Registry,
    *,
    data: str,
    tokenizer: Tokenizer,
    seq: int,
    seed: int,
    data_format: str | None = None,
    overlong: str | None = None,
    loss_on: str = "assistant",
    vocab_size: int | None = None,
) -> RowStream:
    """The rows of `--data`, for a model with so many words (those of the tokenizer if not given).

    Raises DataError if it cannot be opened, UsageError for an option that does not exist.
    """
    source = open_source(registry, data)
    samples = Samples(
        registry, tokenizer, data_format=data_format, loss_on=loss_on, overlong=overlong, vocab_size=vocab_size
    )
    options = {
        "tokenizer": tokenizer.fingerprint,
        "data-format": data_format or "by columns",
        "overlong": overlong or "by format",
        "loss-on": loss_on,
    }
    return RowStream(
        source,
        samples,
        seq=seq,
        seed=seed,
        pad=tokenizer.pad_id,
        options=options,
        name=data,
        notes=tokenizer.notes,
    )


def open_source(registry: Registry, data: str) -> DataSource:
    """The corpus behind `--data`. Raises DataError if no plugin opens it, or if the one that does cannot read it."""
    found = registry.open_data(data)
    if found is None:
        raise DataError(f"--data {data}: no plugin opens it; zoo plugins lists those that are loaded")
    check_source(registry.decider("zoo_open_data"), found)
    return found


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    kept = " (its chat template too; the run's own are in hub/ of its checkpoints)"
    changed = "; ".join(
        f"{name}{kept if name == 'tokenizer' else ''} was {saved.get(name)}, is {now.get(name)}" for name in names
    )
    if changed:
        raise DataError(
            f"the saved data position does not hold any more: {changed}; "
            "give it as it was, or start over with --resume never and another --out"
        )
