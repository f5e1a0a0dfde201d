"""What the command of a resumed run says takes effect, or is refused with a sentence; nothing is left unused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import typing
from pathlib import Path
from unittest import mock

import pytest

from tests.core.run import test_independent_loop as loop
from tests.harness import small_runs
from zoo.cli.main import main
from zoo.core.job.job import Job
from zoo.core.run.metrics import read_metrics

TAKES_EFFECT = "read anew whenever ranks start"
BY_LOOP = "takes effect on what is computed: tests/core/run/test_independent_loop.py resumes with each"
REFUSED = "cannot change within a run"
FIELDS = {
    "model.name": REFUSED,
    "model.size": REFUSED,
    "model.from": REFUSED,
    "model.dtype": TAKES_EFFECT,
    "model.deterministic": TAKES_EFFECT,
    "model.overrides": "refused where it changes the shape of weights, takes effect otherwise",
    "data.path": REFUSED,
    "data.seq": REFUSED,
    "data.global_batch": REFUSED,
    "data.micro_batch": TAKES_EFFECT,
    "data.format": REFUSED,
    "data.overlong": REFUSED,
    "data.loss_on": REFUSED,
    "data.chat_template": REFUSED,
    "data.seed": REFUSED,
    **{f"optim.{name}": BY_LOOP for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "clip")},
    **{f"schedule.{name}": BY_LOOP for name in ("steps", "warmup", "decay", "final")},
    **{f"layout.{name}": TAKES_EFFECT for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "degrees")},
    **{
        f"layout.{name}": TAKES_EFFECT
        for name in ("data_parallel", "reshard", "prefetch", "cp_scheme", "cp_balance", "cp_wire")
    },
    **{f"layout.{name}": TAKES_EFFECT for name in ("pp_schedule", "pp_virtual", "timeout", "sequence_parallel")},
    "layout.overlap_tensor": TAKES_EFFECT,
    "attention.backend": TAKES_EFFECT,
    "attention.mask": TAKES_EFFECT,
    "memory.policy": TAKES_EFFECT,
    "checkpoint.out": "names the run",
    "checkpoint.every": TAKES_EFFECT,
    "checkpoint.keep": TAKES_EFFECT,
    "checkpoint.async": TAKES_EFFECT,
    "checkpoint.resume": "names what is resumed",
    "launch.nproc": TAKES_EFFECT,
    "launch.max_restarts": TAKES_EFFECT,
    "log.every": TAKES_EFFECT,
    "log.track": TAKES_EFFECT,
    "log.peak_tflops": TAKES_EFFECT,
}
CHANGED = [
    (("--seq", 32), "--seq 64", 2),
    (("--global-batch", 4), "--global-batch 2", 2),
    (("--seed", 1), "seed was 0, is 1", 5),
    (("--data", "other.jsonl"), "corpus was", 5),
    (("--data-format", "completion"), "data-format was by columns", 5),
    (("--overlong", "truncate"), "overlong was by format", 5),
    (("--loss-on", "all"), "loss-on was assistant", 5),
    (("--chat-template", "other.jinja"), "tokenizer (its chat template too; ", 5),
    (("--from", "other"), "--from", 2),
    (("--from", "scratch"), "--from", 2),
    (("--from", "deeper", "moved"), "num_hidden_layers 2 where this job has 3", 2),
]
"""Flags of a resumed run that are refused, what the line says, and its status."""


def settings():
    """Every field of a job by its key."""
    for section, kind in typing.get_type_hints(Job).items():
        for target in dataclasses.fields(kind):
            yield f"{section}.{target.metadata.get('key', target.name) or target.name}"


def test_every_setting_is_known_to_take_effect_or_to_be_refused():
    assert set(settings()) == FIELDS.keys(), "say of a new setting what becomes of it when a run is resumed"
    resumed_with = {key for changes in loop.CHANGES for key in changes} | {"schedule.steps"}
    assert resumed_with == {key for key, how in FIELDS.items() if how is BY_LOOP}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models, data, and a run of two steps."""
    folder = tmp_path_factory.mktemp("home")
    small_runs.llama(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    small_runs.llama(folder / "deeper", layers=3)
    small_runs.completions(folder / "data.jsonl")
    small_runs.completions(folder / "other.jsonl", sizes=(2, 1, 2))
    (folder / "other.jinja").write_text(loop.LLAMA3 + " ")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert again("run", "--steps", 2) == 0
    return folder


def again(out, *args):
    """The status of the command of the run, with more."""
    return small_runs.finetune("model", "data.jsonl", out, *args)


@pytest.mark.parametrize(("flags", "words", "status"), CHANGED, ids=lambda value: str(value)[:40])
def test_what_cannot_change_is_one_line_and_leaves_the_run_as_it_was(flags, words, status, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    if flags[-1] == "moved":  # then only its weights tell it from what the run began with
        (home / "model").rename(home / "gone")
    before = (home / "run" / "config.yaml").read_text()
    try:
        assert again("run", "--steps", 3, *flags[:2]) == status
    finally:
        if flags[-1] == "moved":
            (home / "gone").rename(home / "model")
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said, said
    assert "--out" in said
    assert (home / "run" / "config.yaml").read_text() == before
    assert len(read_metrics(home / "run" / "metrics.jsonl")) == 2


def test_another_family_is_refused_by_name(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["finetune", "nemotron", "--size", "tiny", "--data", "data.jsonl", "--seq", "64", "--global-batch", "2"]
    assert main([*words, "--resume", "run", "--out", "nemotron"]) == 2
    assert "holds a model of type llama, and this job trains one of type nemotron" in capsys.readouterr().err


def test_a_model_that_was_moved_is_the_same(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    shutil.copytree("run", tmp_path / "run", symlinks=True)
    (home / "model").rename(tmp_path / "moved")
    try:
        assert again(tmp_path / "run", "--steps", 3, "--from", tmp_path / "moved") == 0
    finally:
        (tmp_path / "moved").rename(home / "model")


def test_the_rest_of_a_command_takes_effect(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    runs = {}
    for name, more in (
        ("same", ()),
        ("changed", ("--dtype", "float64", "--keep", 3, "--save-every", 1, "--memory", "full", "--attn", "dense")),
        ("full", ("--set", "attention.mask=full")),
        ("theta", ("--set", "model.rope_theta=50")),
    ):
        shutil.copytree("run", tmp_path / name, symlinks=True)
        assert again(tmp_path / name, "--steps", 4, *more) == 0
        runs[name] = read_metrics(tmp_path / name / "metrics.jsonl")[2:]
    steps = [path.name for path in (tmp_path / "changed" / "checkpoints").iterdir() if path.name[-1].isdigit()]
    assert sorted(steps) == ["step-2", "step-3", "step-4"]
    assert runs["changed"][1]["loss"] == pytest.approx(runs["same"][1]["loss"], rel=1e-4)
    assert runs["changed"][1]["loss"] != runs["same"][1]["loss"], "fp64 has other digits"
    for name in ("full", "theta"):
        assert runs[name][0]["loss"] != pytest.approx(runs["same"][0]["loss"], rel=1e-4), name


def test_the_docs_name_every_setting_that_cannot_change():
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    table = page.partition("## Resuming")[2].partition("## What numbers")[0]
    named = {key for key in FIELDS if f"`{key}`" in table and f"| `{key}`" in table.replace(", `", "| `")}
    assert named == {key for key, how in FIELDS.items() if how is REFUSED}


@pytest.mark.parametrize("name", [".config.yaml.new", "metrics.jsonl.new"])
def test_a_disk_that_is_full_at_the_start_is_one_line(name, tmp_path, capsys):
    """/dev/full answers as a full disk does; the error of `write` names no file."""
    model, data = small_runs.llama(tmp_path / "model"), small_runs.completions(tmp_path / "data.jsonl")
    assert small_runs.finetune(model, data, tmp_path / "run", "--steps", 1) == 0
    (tmp_path / "run" / name).symlink_to("/dev/full")
    assert small_runs.finetune(model, data, tmp_path / "run", "--steps", 2) == 5
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"Error: {tmp_path}/run cannot be written: No space left on device; see to the disk")


def test_a_file_system_that_is_read_only_is_named(tmp_path, capsys, monkeypatch):
    model, data = small_runs.llama(tmp_path / "model"), small_runs.completions(tmp_path / "data.jsonl")
    monkeypatch.setattr(os, "statvfs", lambda _path: mock.Mock(f_flag=os.ST_RDONLY))
    assert small_runs.finetune(model, data, tmp_path / "run", "--steps", 1) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("run: Read-only file system; give another --out")
