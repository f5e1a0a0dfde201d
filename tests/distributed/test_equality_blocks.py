"""A model whose layers differ, in real runs in fp64: heads of every layer are cut and exchanged by their own number."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_equality import assert_same
from tests.harness.command import train, zoo
from tools import nas_checkpoint as nas

STEPS = ("--steps", "4", "--seq", "256", "--global-batch", "2", "--data", "stdlib")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    checkpoint = nas.save(tmp_path_factory.mktemp("nas") / "hub")
    return ("nemotron-nas", "--from", checkpoint, "--dtype", "float64", *STEPS)


@pytest.mark.dist
def test_layers_that_differ_run_under_any_layout(job, tmp_path):
    """With ulysses each layer's heads are dealt out; there are fewer K/V heads than ranks in one."""
    single = train(tmp_path / "single", *job)
    layout = ("--dp-shard", 2, "--cp", 2, "--cp-scheme", "ulysses", "--memory", "full")
    assert_same(train(tmp_path / "run", *job, *layout), single)


def test_import_and_export_give_back_what_is_there(job, tmp_path):
    checkpoint = job[2]
    zoo("import", checkpoint, tmp_path / "ours")
    zoo("export", tmp_path / "ours", "--to", "hf", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
