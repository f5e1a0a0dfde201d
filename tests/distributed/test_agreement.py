"""Ranks of an outer launcher are one job: what differs is one line, the same on all of them, before the first step."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from safetensors.torch import load_file, save_file

import zoo.models.llama3
from tests.harness.pooled_command import joined
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

pytestmark = pytest.mark.dist

JOB = ("finetune", "llama3", "--seq", "64", "--cp", "2", "--steps", "1")
ROWS = ("finetune", "llama3", "--seq", "64", "--dp-shard", "2", "--steps", "1")
"""Both ranks read data."""
HOST = f"(host {socket.gethostname()})"


def refused(first, second, status=2, **environment):
    """The error of a job whose ranks are given these words: the same on both, and nothing trained."""
    (status_0, said_0), (status_1, said_1) = joined(first, second, **environment)
    assert (status_0, status_1) == (status, status), said_0 + said_1
    errors = {said.splitlines()[-1] for said in (said_0, said_1)}
    assert len(errors) == 1, errors
    (error,) = errors
    assert "Traceback" not in said_0 + said_1
    assert "step 1/" not in said_0
    return error


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (("--lr", "1e-5"), ("--lr", "1e-2"), f"optim.lr: 1e-05 on rank 0, 0.01 on rank 1 {HOST}"),
        (("--seed", "1"), ("--seed", "2"), f"data.seed: 1 on rank 0, 2 on rank 1 {HOST}"),
        ((), ("--set", "model.rms_norm_eps=0.1"), "model.rms_norm_eps: unset on rank 0, 0.1 on rank 1"),
        ((), ("--steps", "2", "--set", "log.every=7"), "schedule.steps: 1 on rank 0, 2 on rank 1"),
        (("--cp-scheme", "ring"), ("--cp-scheme", "allgather"), "layout.cp_scheme: "),
    ],
)
def test_ranks_with_other_settings_are_told_which(tmp_path, first, second, says):
    error = refused((*JOB, "--out", tmp_path, *first), (*JOB, "--out", tmp_path, *second))
    assert error.startswith("Error: ranks of one job differ: ")
    assert says in error
    assert not (tmp_path / "metrics.jsonl").exists()
    assert Checkpoints(tmp_path, keep=1).steps() == []


def test_ranks_with_other_plugins_are_told_which(tmp_path):
    error = refused((*JOB, "--out", tmp_path), (*JOB, "--out", tmp_path, "--no-plugin", "tensorboard"), 4)
    assert f"rank 1 {HOST} loaded other plugins than rank 0: tensorboard (zoo) is not loaded here" in error


def test_another_model_is_an_error_and_no_abort(tmp_path):
    error = refused((*JOB, "--out", tmp_path), ("finetune", "mixtral", *JOB[2:], "--out", tmp_path))
    assert f"model.name: llama3 on rank 0, mixtral on rank 1 {HOST}" in error


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--from", "/nowhere"), 2, f"rank 1 {HOST}: /nowhere does not exist"),
        (("--data", "/nowhere.jsonl"), 5, f"rank 1 {HOST}: --data /nowhere.jsonl"),
        (("--set", "optim.rl=1"), 2, f"rank 1 {HOST}: unknown key 'optim.rl'"),
        (
            ("--set", "layout.timeout=-1"),
            2,
            f"rank 1 {HOST}: layout.timeout (--set layout.timeout=-1): -1.0 is out of range",
        ),
    ],
)
def test_what_one_rank_must_refuse_all_refuse(tmp_path, words, status, says):
    assert says in refused((*JOB, "--out", tmp_path), (*JOB, "--out", tmp_path, *words), status)


def test_an_error_of_all_ranks_blames_none_of_them(tmp_path):
    words = (*JOB, "--out", tmp_path, "--data", "/nowhere.jsonl")
    assert refused(words, words, 5).startswith("Error: --data /nowhere.jsonl")


@pytest.fixture
def corpora(tmp_path):
    """Two files of one name, size, and number of samples; and a third that is the first under another path."""
    paths = [tmp_path / name / "rows.jsonl" for name in ("one", "other", "same")]
    for path, word in zip(paths, ("spam", "eggs", "spam"), strict=True):
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(100)))
    return paths


def test_other_content_of_the_data_is_noticed_and_another_spelling_is_not(tmp_path, corpora):
    one, other, same = ((*ROWS, "--out", tmp_path / "run", "--data", path) for path in corpora)
    error = refused(one, other)
    assert "ranks of one job differ: corpus: 1 files of " in error
    assert "on rank 1" in error
    assert [status for status, _ in joined(one, same)] == [0, 0]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_ranks_that_read_no_data_need_not_have_the_same(tmp_path, corpora):
    one, other, _ = ((*JOB, "--out", tmp_path / "run", "--data", path) for path in corpora)
    assert [status for status, _ in joined(one, other)] == [0, 0]


def test_other_weights_are_noticed(tmp_path):
    source = next(iter(zoo.models.llama3.__path__)) + "/tiny"
    # Of the same name, for recipes go by it.
    copy = shutil.copytree(source, tmp_path / "copy" / "tiny")
    weights = load_file(copy / "model.safetensors")
    save_file({name: w * 1.5 for name, w in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    words = (*JOB, "--out", tmp_path / "run", "--data", "stdlib", "--from")
    assert "ranks of one job differ: weights: " in refused((*words, source), (*words, copy))


def test_another_checkpoint_to_go_on_from_is_noticed(tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, lr in zip(runs, ("1e-4", "1e-3"), strict=True):
        words = (*JOB, "--out", run, "--lr", lr)
        assert [status for status, _ in joined(words, words)] == [0, 0]
    words = (*JOB, "--steps", "2", "--out", tmp_path / "c", "--resume")
    error = refused((*words, runs[0]), (*words, runs[1] / "checkpoints" / "step-1"))
    assert "content of that checkpoint: " in error
    assert "resumed step: unset on rank 0, 1 on rank 1" in refused((*words, "auto"), (*words, runs[1]))
    same = shutil.copytree(runs[0], tmp_path / "same", symlinks=True)
    assert [status for status, _ in joined((*words, runs[0]), (*words, same))] == [0, 0]


def test_a_run_directory_that_is_not_shared_is_refused_and_not_left_behind(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "host" / "other"
    error = refused((*JOB, "--out", mine), (*JOB, "--out", other))
    assert f"the run directory is {mine} on rank 0, and {other} on rank 1 {HOST} is another folder" in error
    assert not other.parent.exists()
    assert [*mine.iterdir()] == []


def test_paths_may_be_spelt_otherwise(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    words = [(*JOB, "--out", tmp_path / name) for name in ("run", "link")]
    assert [status for status, _ in joined(*words)] == [0, 0]
    # And all of them know that there is nothing left to do.
    again = joined(*words)
    assert [status for status, _ in again] == [0, 0]
    assert "all 1 steps already" in again[0][1]


def test_a_run_directory_that_cannot_be_made_is_refused_by_all(tmp_path):
    (tmp_path / "file").write_text("")
    error = refused((*JOB, "--out", tmp_path / "run"), (*JOB, "--out", tmp_path / "file" / "run"))
    assert f"rank 1 {HOST}: {tmp_path}/file/run cannot be made: Not a directory; give another --out" in error


@pytest.mark.parametrize(
    ("change", "says"), [({"RANK": "abc"}, "RANK is 'abc'"), ({"WORLD_SIZE": ""}, "WORLD_SIZE is not")]
)
def test_variables_that_make_no_sense_are_one_line(tmp_path, change, says):
    ((status, said),) = joined((*JOB, "--out", tmp_path), **change)
    assert status == 2
    assert says in said


def test_one_rank_without_a_place_to_meet_trains_alone(tmp_path):
    words = (*JOB[:-4], "--steps", "1", "--out", tmp_path)
    ((status, said),) = joined(words, MASTER_ADDR="", MASTER_PORT="")
    assert status == 0, said
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
