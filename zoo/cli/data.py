"""`zoo data check` and `zoo data preview`: what training would make of a corpus, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click

from zoo.cli.session import Session, pass_session
from zoo.core.contracts.data import Record
from zoo.core.data.documents import Document
from zoo.core.data.report import Problems, Survey, records, survey
from zoo.core.data.rows import open_source
from zoo.core.data.samples import LOSS_ON, Samples
from zoo.core.errors import DataError, UsageError
from zoo.core.humanize import parse_tokens
from zoo.core.registry.decisions import Registry
from zoo.core.tokenizer.files import read_object
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.core.tokenizer.vocabulary import check_vocabulary


@click.group()
def data() -> None:
    """Look at training data as training will see it."""


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--chat-template", metavar="FILE", help="jinja file to use instead of the tokenizer's own"),
        click.option("--loss-on", default="assistant", metavar="|".join(LOSS_ON), help="what is trained"),
        click.option("--data-format", metavar="NAME", help="text, messages, completion; by default by columns"),
        click.option("--from", "source", metavar="DIR", help="directory of the tokenizer; by default the embedded one"),
        click.argument("path"),
    ):
        command = option(command)
    return command


@data.command()
@_options
@click.option("--seq", default="64k", metavar="TOKENS", help="length of a row, to count longer samples")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_session
def check(session: Session, /, path: str, seq: str, as_json: bool, **options: Any) -> None:
    """Read all of PATH and count: formats, lengths, trained tokens; name what cannot be used (then exit status 5)."""
    length = parse_tokens(seq)
    samples = _samples(session.registry, **options)
    found = survey(open_source(session.registry, path), samples, seq=length)
    notes = samples.tokenizer.notes
    said = _as_json(found) | {"notes": list(notes)}
    lines = [*_lines(found, length), *(f"warning   {note}" for note in notes)]
    click.echo(json.dumps(said, indent=2) if as_json else "\n".join(lines))
    bad = found.broken.count + found.untrained.count
    if bad or not found.tokens:
        raise DataError(f"{path}: {bad} samples cannot be used" if bad else f"{path}: no sample has any text")


@data.command()
@_options
@click.option("--row", type=click.IntRange(min=1), default=1, help="number of the first sample to show, from 1")
@click.option("--count", type=click.IntRange(min=1), default=1, help="how many samples to show")
@pass_session
def preview(session: Session, /, path: str, row: int, count: int, **options: Any) -> None:
    """Print samples of PATH as text, with trained tokens in green (between >>> and <<< where there is no colour)."""
    samples = _samples(session.registry, **options)
    shown = 0
    for record in islice(_records(session.registry, path), row - 1, row - 1 + count):
        document = samples(record)
        kinds = f"{samples.format_of(record)}, {len(document.tokens):,} tokens, {document.num_trained:,} trained"
        click.echo(f"--- {record.where}: {kinds}")
        for remark in document.remarks:
            click.echo(f"warning: {remark.kind}: {remark.place}".rstrip(": "))
        click.echo(_painted(document, samples.tokenizer, colour=sys.stdout.isatty()))
        shown += 1
    if not shown:
        raise DataError(f"{path} has no sample {row}; type a smaller --row")


def _samples(
    registry: Registry, *, source: str | None, data_format: str | None, loss_on: str, chat_template: str | None
) -> Samples:
    folder = Path(source or _embedded(registry))
    tokenizer = Tokenizer.from_directory(folder, chat_template=chat_template)
    rows = read_object(folder / "config.json").get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(tokenizer, rows)
    return Samples(registry, tokenizer, data_format=data_format, loss_on=loss_on)


def _embedded(registry: Registry) -> Path:
    for entry in registry.models:
        for path in entry.embedded.values():
            return Path(path)
    raise UsageError("no plugin ships a tokenizer; say where one is: --from DIR")


def _records(registry: Registry, path: str) -> Iterator[Record]:
    broken = Problems()
    yield from records(open_source(registry, path), broken)
    if broken.first:
        raise DataError(broken.first[0])


def _painted(document: Document, tokenizer: Tokenizer, *, colour: bool) -> str:
    pairs = zip(document.tokens.tolist(), document.trained.tolist(), strict=True)
    texts = [
        (trained, tokenizer.decode([id for id, _ in run])) for trained, run in groupby(pairs, lambda pair: pair[1])
    ]
    if colour:
        return "".join(click.style(text, fg="green") if trained else text for trained, text in texts)
    return "".join(f">>>{text}<<<" if trained else text for trained, text in texts)


def _lines(found: Survey, seq: int) -> Iterator[str]:
    kinds = ", ".join(f"{count:,} {name}" for name, count in found.formats.most_common()) or "none"
    share = 100 * found.trained_tokens / found.tokens if found.tokens else 0
    yield f"samples   {found.samples:,} ({kinds}), {found.blank:,} blank"
    yield f"tokens    {found.tokens:,}, {found.trained_tokens:,} trained ({share:.1f} %)"
    yield f"longest   {found.longest:,} tokens"
    for power, count in sorted(found.lengths.items()):
        yield f"  up to {2**power:>9,} tokens: {count:,}"
    yield from _problems(f"longer than a row of {seq:,} tokens (see --overlong)", found.overlong)
    yield from (f"warning   {line}" for line in found.remarks.lines())
    yield from _problems("without a trained token (see --loss-on)", found.untrained)
    yield from _problems("broken", found.broken)


def _problems(what: str, problems: Problems) -> Iterator[str]:
    if problems.count:
        yield f"{problems.count:,} {what}:"
        yield from (f"  {line}" for line in problems.first)
        yield from ["  ..."] if problems.count > len(problems.first) else []


def _as_json(found: Survey) -> dict[str, Any]:
    kept = {name: getattr(found, name) for name in ("samples", "tokens", "trained_tokens", "blank", "longest")}
    kept["formats"] = dict(found.formats)
    kept["lengths"] = {str(2**power): count for power, count in sorted(found.lengths.items())}
    for name in ("overlong", "untrained", "broken"):
        problems: Problems = getattr(found, name)
        kept[name] = {"count": problems.count, "first": problems.first}
    kept["warnings"] = found.remarks.as_json()
    return kept
