"""From records to documents: the format of each record is found by its columns, and its samples are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from zoo.core.contracts.data import DataFormat, Record
from zoo.core.data.documents import OVERLONG, Document, Overlong
from zoo.core.errors import DataError, UsageError, ZooError, did_you_mean, one_line
from zoo.core.registry.answers import sample_arrays

if TYPE_CHECKING:
    from zoo.core.registry.decisions import Registry
    from zoo.core.tokenizer.tokenizer import Tokenizer

LOSS_ON = ("assistant", "completion", "last", "all")
"""What of a conversation is trained."""


class Samples:
    """Turns records into documents. Safe to use from several threads."""

    def __init__(
        self,
        registry: Registry,
        tokenizer: Tokenizer,
        *,
        data_format: str | None = None,
        loss_on: str = "assistant",
        overlong: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`data_format` is looked for in each record's columns if None; `overlong` is then the format's own choice.

        Token ids are below `vocab_size`, that of the tokenizer if not given. Raises UsageError for an unknown name.
        """
        check_choice("--loss-on", loss_on, LOSS_ON)
        if overlong is not None:
            check_choice("--overlong", overlong, OVERLONG)
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._registry = registry
        self._format = data_format
        self._overlong = overlong
        self._names: dict[frozenset[str], str] = {}
        self._formats: dict[str, tuple[DataFormat, Overlong]] = {}
        if data_format is not None:
            self._load(data_format)

    def __call__(self, record: Record) -> Document:
        """The record's sample as arrays. Raises DataError that names the record."""
        format, overlong = self._load(self.format_of(record))
        try:
            sample = format(record, self.tokenizer, loss_on=self.loss_on)
        except ZooError:
            raise
        except Exception as error:  # a format may be anybody's
            raise self._failed(record, error) from error
        tokens, trained = sample_arrays(self.format_of(record), record, sample, self._vocab_size)
        return Document(
            tokens=tokens, trained=trained, overlong=overlong, where=record.where, remarks=tuple(sample.remarks)
        )

    def _failed(self, record: Record, error: Exception) -> DataError:
        """Return what to say of a record on which its format failed; whose it is, if it is not zoo's own."""
        name = self.format_of(record)
        owner = self._registry.data_formats.owner(name)
        of, instead = ("", "") if owner.source.builtin else (f" of plugin {owner.label}", f"--no-plugin {owner.name}")
        said = f"{record.where}: data format {name}{of} failed on it: {one_line(error)}"
        return DataError(f"{said}. Go without it: {instead}" if instead else said)

    def format_of(self, record: Record) -> str:
        """Name of the record's format. Raises DataError if its columns fit none."""
        if self._format is not None:
            return self._format
        # Writers of tables fill the columns that a record lacks with null.
        columns = frozenset(name for name, value in record.fields.items() if value is not None)
        if columns not in self._names:
            self._names[columns] = self._detected(record, columns)
        return self._names[columns]

    def _detected(self, record: Record, columns: frozenset[str]) -> str:
        try:
            found = self._registry.detect_data_format(sorted(columns))
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None
        if found is not None:
            return found
        if record.fields and not columns:
            raise DataError(
                f"{record.where}: all its columns ({', '.join(sorted(record.fields))}) hold null; take it out"
            )
        known = ", ".join(self._registry.data_formats.names()) or "none"
        raise DataError(
            f"{record.where}: its columns ({', '.join(sorted(columns)) or 'none'}) fit no data format; name them text, "
            f"messages, or prompt and completion, or type --data-format NAME (there are: {known})"
        )

    def _load(self, name: str) -> tuple[DataFormat, Overlong]:
        if name not in self._formats:
            entry = self._registry.data_formats.get(name)
            check_choice(f"'overlong' of data format {name}", entry.overlong, OVERLONG)
            chosen = cast(Overlong, self._overlong or entry.overlong)
            self._formats[name] = (self._registry.data_formats.load(name), chosen)
        return self._formats[name]


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{what} must be {'|'.join(allowed)}, not '{value}'. {did_you_mean(value, allowed)}".strip())
