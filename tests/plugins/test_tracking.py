"""What is seen of a run: the progress line, and trackers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zoo.core.contracts.run import RunInfo
from zoo.core.errors import UsageError
from zoo.plugins.tracking.progress_plugin import Progress, line
from zoo.plugins.tracking.tensorboard import TensorBoard

METRICS = {"step": 10.0, "loss": 1.84213, "grad_norm": 0.871, "lr": 2e-5, "tokens_per_s": 30912.4}
METRICS |= {"mfu": 0.391, "mem_peak_gib": 24.1}


@pytest.fixture
def run(tmp_path):
    return RunInfo(
        path=tmp_path, model="m", size="s", steps=2000, first_step=0, world_size=8, config={}
    )  # fmt: skip


def test_a_step_in_one_line():
    wanted = "step   10/2000  loss 1.8421  gnorm 0.87  lr 2.0e-05  tok/s 30,912  mfu 39.1%  mem 24.10GiB  eta 1h09m"
    assert line(2000, METRICS, 4150) == wanted


def test_without_a_known_peak_there_is_no_mfu():
    assert "mfu" not in line(2000, {k: v for k, v in METRICS.items() if k != "mfu"}, 1)


def test_elsewhere_than_on_a_terminal_lines_are_plain(run, capsys):
    progress = Progress()
    progress.zoo_run_start(run)
    progress.zoo_step_end(run, 10, METRICS)
    progress.zoo_checkpoint_saved(run, 10, "somewhere/step-10")
    progress.zoo_run_end(run, "done")
    said = capsys.readouterr()
    assert said.out == ""
    assert "\r" not in said.err
    assert [text.split()[0] for text in said.err.splitlines()] == ["step", "saved", "done", "next"]


def test_on_a_terminal_the_line_refreshes_and_other_lines_clear_it(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    progress.zoo_run_start(run)
    progress.zoo_step_end(run, 10, METRICS)
    progress.zoo_checkpoint_saved(run, 10, "somewhere/step-10")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("\r\033[Kstep")
    assert "\r\033[Ksaved" in said


def test_a_tracker_whose_package_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'zoo\[tensorboard\]'"):
        TensorBoard(Path(tmp_path))
