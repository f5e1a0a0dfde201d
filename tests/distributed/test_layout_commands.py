"""One command under every layout: metrics.jsonl is the same to 1e-9, and what it exports the same byte for byte.

The ranks are those of the pool (`pooled_command`); `python -m tools.layout_commands` does the same with real processes.
"""

from __future__ import annotations

import hashlib
from functools import cache

import pytest

from tests.distributed.pooled_command import command, train
from tests.layout_commands import CASES, Corpus, furthest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    """Metrics and exported files of the same job in one process."""

    @cache
    def run(model, layers, rows):
        out = tmp_path_factory.mktemp("single") / "run"
        return train(out, *corpus.command(model, layers, rows)), exported(out)

    return run


def exported(run):
    """SHA-256 of every file that two exports of a run consist of."""
    files = {}
    for dtype in ("float32", "bfloat16"):
        folder = run / dtype
        command("export", run, folder, *(() if dtype == "float32" else ("--dtype", dtype)))
        files |= {f"{dtype}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    return files


@pytest.mark.parametrize("case", CASES, ids=str)
def test_metrics_and_exports_of_any_layout_are_those_of_one_process(case, corpus, single, tmp_path):
    metrics, files = single(*case.job)
    run = tmp_path / "run"
    assert furthest(train(run, *corpus.command(*case.job), *case.words), metrics) < 1e-9
    assert exported(run) == files
