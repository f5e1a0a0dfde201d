"""The example of a kernel in one file: it meets the contract, and trains under context parallelism like any other."""

import importlib.util
from pathlib import Path

import pytest

from tests.harness.command import train
from zoo.testing.attention import AttentionContract

FILE = Path(__file__).parents[2] / "examples" / "attention_kernel.py"


class TestPlain(AttentionContract):
    @pytest.fixture
    def backend(self):
        spec = importlib.util.spec_from_file_location("attention_kernel", FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Plain()


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) < 60


@pytest.mark.dist
def test_a_run_with_it_on_two_ranks_is_the_run_with_the_built_in_kernel_on_one(tmp_path):
    job = ("llama3", "--seq", 256, "--steps", 2, "--dtype", "float64", "--seed", 5)
    mine = train(tmp_path / "mine", *job, "--plugin", FILE, "--attn", "plain", "--cp", 2)
    wanted = train(tmp_path / "wanted", *job, "--attn", "dense")
    assert (tmp_path / "mine" / "config.yaml").read_text().count("plain") == 1
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in wanted], rel=1e-9)
