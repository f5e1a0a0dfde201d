"""One command under every layout: metrics.jsonl is the same to 1e-9, and what it exports the same byte for byte.

Most ranks are those of the pool (`pooled_command`), those of the heaviest mixes processes of their own;
`python -m tools.layout_commands` has real processes for all.

Exports are cast from float64, in which weights differ by up to 6e-14 from layout to layout. No weight of these models
lies nearer to where rounding to float32 changes than 130 times the most it differs by under any layout, and to where
rounding to bfloat16 does than 1e6 times: equal files are no matter of luck, in whatever order a machine adds.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import command as real
from tests.harness.pooled_command import command, train
from tools.layout_cases import CASES, Corpus, furthest, untimed

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


MIXES = [
    "llama-tied --pp 2 --cp 2 --tp 2",
    "mixtral --dp-shard 2 --cp 2 --tp 2 --ep 4 --memory full",
    "mixtral --pp 2 --cp 2 --tp 2 --ep 2 --pp-schedule interleaved",
]


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in MIXES], ids=str)
def test_processes_of_their_own_make_the_same_of_the_heaviest_mixes(case, corpus, single, tmp_path):
    metrics, files = single(*case.job)
    run = tmp_path / "run"
    assert furthest(untimed(real.train(run, *corpus.command(*case.job), *case.words)), metrics) < 1e-9
    assert exported(run) == files


def test_a_run_in_float64_is_exported_in_float32_unless_more_is_asked(corpus, tmp_path):
    run = tmp_path / "run"
    train(run, *corpus.command("llama", 2, 2))
    for dtype in ((), ("--dtype", "stored")):
        command("export", run, tmp_path / str(len(dtype)), *dtype)
    published, kept = (load_file(tmp_path / name / "model.safetensors") for name in "02")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "02"]
    assert [config["torch_dtype"] for config in configs] == ["float32", "float64"]
    assert {tensor.dtype for tensor in kept.values()} == {torch.float64}
    assert published.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name].float()) for name, tensor in published.items())
