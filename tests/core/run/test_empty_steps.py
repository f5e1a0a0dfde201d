"""A step without a trained token: nothing moves, nothing is said to be a loss, and it is counted."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import zoo
from tests.harness import small_runs
from zoo.core.contracts.batch import IGNORE
from zoo.core.data.rows import RowStream
from zoo.core.run.metrics import read_metrics
from zoo.plugins.tracking.progress_plugin import line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(steps without labels, flags) -> status of a run whose rows lose their labels in these steps."""
    small_runs.llama(tmp_path / "model")
    small_runs.completions(tmp_path / "data.jsonl")
    take = RowStream.take

    def start(empty, *args):
        # The stream counts its own rows, also those of an earlier run that it goes on from.
        taken = {"rows": 0}

        def without_labels(self, count):
            rows = take(self, count)
            taken["rows"] += 1
            if taken["rows"] not in empty:
                return rows
            return [dataclasses.replace(row, labels=np.full_like(row.labels, IGNORE)) for row in rows]

        monkeypatch.setattr(RowStream, "take", without_labels)
        return small_runs.finetune(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run", *args)

    return start


def test_weights_and_moments_stay_the_loss_is_null_and_it_is_said(run, tmp_path, capsys):
    assert run({2, 3}, "--steps", 4, "--save-every", 1, "--keep", 9, "--lr", 0.01, "--log-every", 2) == 0
    said = capsys.readouterr().err
    assert said.count("no token of step 2 is trained") == 1
    assert "2 steps trained nothing" in said
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["loss"] is None for row in metrics] == [False, True, True, False]
    assert [row["grad_norm"] is None for row in metrics] == [False, True, True, False]
    assert metrics[3]["trained_tokens"] > metrics[2]["trained_tokens"] == metrics[0]["trained_tokens"]
    assert [row["lr"] for row in metrics] == pytest.approx([0.01, 0.01, 0.0055, 0.001]), "the schedule moves on"
    first, *others = (zoo.load(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in (1, 2, 3, 4))
    equal = [all(map(torch.equal, first.parameters(), other.parameters())) for other in others]
    assert equal == [True, True, False]
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-4" / "progress.json").read_text())
    assert progress["empty_steps"] == 2


def test_counts_go_on_when_a_run_is_resumed(run, tmp_path, capsys):
    assert run({2}, "--steps", 2) == 0
    assert run({1}, "--steps", 4) == 0
    assert "2 steps trained nothing" in capsys.readouterr().err
    assert [row["loss"] is None for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        False,
        True,
        True,
        False,
    ]


def test_a_run_that_trains_nothing_at_all_is_an_error_and_saves_nothing(run, tmp_path, capsys):
    assert run({1, 2, 3}, "--steps", 3) == 5
    said = capsys.readouterr().err.splitlines()
    assert [text for text in said if text.startswith("Error: no token was trained in 3 steps")]
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_trackers_and_observers_get_numbers_only(run, tmp_path):
    """TensorBoard takes no null; it is asked for a step with and one without a loss."""
    pytest.importorskip("tensorboard")
    assert run({2}, "--steps", 3, "--track", "tensorboard") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert [event.step for event in events.Scalars("train/lr")] == [1, 2, 3]


def test_the_progress_line_says_so():
    metrics = {"step": 2.0, "lr": 1e-3, "tokens_per_s": 10.0, "mem_peak_gib": 0.0}
    assert "nothing trained" in line(4, metrics, 1.0)
    assert "nothing trained" not in line(4, metrics | {"loss": 1.0, "grad_norm": 1.0}, 1.0)
