"""Every number of a job has a span; what is outside is one line of `zoo plan` and status 2, what is odd a note."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import pytest

from zoo.cli.main import main
from zoo.core.errors import UsageError
from zoo.core.job.flags import from_flags
from zoo.core.job.job import Job
from zoo.core.job.ranges import Span


def numbers():
    """Key and field of every setting whose type has int or float in it."""
    for section, kind in typing.get_type_hints(Job).items():
        hints = typing.get_type_hints(kind)
        for target in dataclasses.fields(kind):
            if {int, float} & {hints[target.name], *typing.get_args(hints[target.name])}:
                yield f"{section}.{target.metadata.get('key', target.name)}", target


NUMBERS = dict(numbers())
SPANS = {key: target.metadata.get("span") for key, target in NUMBERS.items()}


def outside(span):
    """Just out at both ends."""
    low = span.low if span.above else span.low - 1
    high = span.high if span.below else span.high * 2 + 1
    return [low, high]


def refused(*args, capsys):
    """What `zoo plan` says of a setting that it refuses."""
    assert main(["plan", "llama3", "--size", "tiny", *map(str, args)]) == 2, args
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


def test_layers_that_were_said_on_the_command_line_are_not_blamed_on_the_file(capsys):
    said = ("plan", "llama3", "--size", "tiny", "--seq", "1k", "--set", "model.num_hidden_layers=1000")
    assert main([*said]) == 5
    err = capsys.readouterr().err
    assert err.startswith("Error: num_hidden_layers is 1000, and ")
    assert "--set" in err


def test_every_number_has_a_span_that_holds_its_default():
    assert len(NUMBERS) >= 27
    for key, target in NUMBERS.items():
        assert isinstance(SPANS[key], Span), f"{key} needs a span: declare it by zoo.core.job.ranges.number"
        assert target.default is None or target.default in SPANS[key], key
        assert target.default is None or target.default in (target.metadata.get("usual") or SPANS[key]), key


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_out_of_range_is_one_line_of_the_plan(key, capsys):
    for value in outside(SPANS[key]):
        said = refused("--set", f"{key}={value}", capsys=capsys)
        assert key.partition(".")[2].replace("_", "-") in said.replace("_", "-"), said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "true", "[1]", "{a: 1}", "''", "no"])
@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_number_is_a_usage_error(key, value):
    with pytest.raises(UsageError, match=key) as caught:
        Job.from_settings(*from_flags("llama3", {"set": (f"{key}={value}",)}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--global-batch", -2), ("--global-batch", "-2", "at least 1")),
        (("--seed", 2**63), ("--seed", str(2**63), "4,294,967,295")),
        (("--seed", 9007199254740993), ("9007199254740993",)),
        (("--seq", f"{10**400}"), ("--seq",)),
        (("--steps", "1e400"), ("--steps", "1e400")),
        (("--steps", 5, "--set", "schedule.warmup=6"), ("schedule.warmup", "--steps 6")),
        (("--set", "model.rms_norm_eps=nan"), ("model", "rms_norm_eps", "finite")),
        (("--set", "model.rms_norm_eps=-1"), ("model", "rms_norm_eps", "from 0 to 1")),
        (("--set", "model.num_hidden_layers=1.5"), ("model", "num_hidden_layers", "integer")),
        (("--set", "model.rope_theta=.inf"), ("model", "rope_theta")),
        (("--set", "model.vocab_size=-5"), ("model", "vocab_size")),
        (("--set", "log.track={a: b}"), ("log.track", "names")),
        (("--set", "data.path=[a, b]"), ("data.path", "text")),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_the_line_names_the_setting_and_what_it_may_be(args, words, capsys):
    said = refused(*args, capsys=capsys)
    for word in words:
        assert word in said, said


def test_numbers_are_read_without_rounding():
    assert Job.from_settings(*from_flags("llama3", {"seed": str(2**32 - 1), "steps": "1e6"})).data.seed == 2**32 - 1
    assert Job.from_settings(*from_flags("llama3", {"global_batch": "2.0", "steps": "1e6"})).schedule.steps == 10**6


def test_what_is_odd_and_allowed_is_a_note(capsys):
    odd = ("--lr", "3", "--set", "optim.weight_decay=2", "--set", "optim.eps=0.01")
    assert main(["plan", "llama3", "--size", "tiny", *odd]) == 0
    said = "".join(capsys.readouterr())
    for word in ("optim.lr is 3.0", "optim.weight_decay is 2.0", "optim.eps is 0.01", "usually at least"):
        assert word in said, said
    assert main(["plan", "llama3", "--size", "tiny", "--lr", "1e-3"]) == 0
    assert "usually" not in "".join(capsys.readouterr())


def test_a_span_has_its_ends_unless_it_says_otherwise():
    assert 0 in Span(0, 1)
    assert 1 in Span(0, 1)
    assert 0 not in Span(0, 1, above=True)
    assert 1 not in Span(0, 1, below=True)
    assert math.nan not in Span(0, 1)
    assert math.inf not in Span(0, math.inf)
    assert str(Span(0, 1, above=True, below=True)) == "more than 0 and less than 1"


def test_the_table_in_the_docs_is_what_is_checked():
    rows = [f"| `{key}` | {default(target)} | {SPANS[key]} | {usually(target)} |" for key, target in NUMBERS.items()]
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    assert page.partition("|---|---|---|---|\n")[2].splitlines() == rows


def default(target):
    return "" if target.default is None else target.default


def usually(target):
    return target.metadata.get("usual") or ""
