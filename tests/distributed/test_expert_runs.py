"""Real commands on a mixture of experts: under expert parallelism they are the same run, and its export the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import layouts
from tests.harness.command import train, zoo
from zoo.core.model.inventory import rule_book
from zoo.core.model.load import ModuleSource
from zoo.models.llama3.sizes import TINY
from zoo.models.mixtral.model import SPEC

pytestmark = pytest.mark.dist

JOB = (
    "mixtral",
    "--data",
    "stdlib",
    "--seq",
    512,
    "--dtype",
    "float64",
    "--steps",
    3,
    "--lr",
    1e-3,
    "--global-batch",
    2,
)
AUX = ("--set", "model.output_router_logits=true", "--set", "model.router_aux_loss_coef=0.05")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Mixtral in the hub's form, with the tokenizer of the embedded Llama."""
    folder = tmp_path_factory.mktemp("mixtral")
    config = SPEC.parse(SPEC.hub_config(layouts.config("mixtral-plain")) | {"vocab_size": 2048})
    torch.manual_seed(0)
    source = rule_book(SPEC, config).to_hub(ModuleSource(SPEC.build(config)))
    tensors = {name: source.read(name, tuple(slice(0, n) for n in source.shape(name))) for name in source.names()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SPEC.hub_config(config)))
    for file in (*TINY.glob("tokenizer*"), *TINY.glob("special_tokens*")):
        shutil.copy(file, folder)
    return folder


def test_expert_parallel_runs_and_their_exports_equal_one_process(checkpoint, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    single = train(one, *JOB, "--from", checkpoint, *AUX)
    # Two ranks of data parallelism come by themselves, for ep folds over four ranks.
    run = train(four, *JOB, "--from", checkpoint, *AUX, "--ep", 4, "--cp", 2, "--memory", "full")
    loads = [f"expert_load.{e}" for e in range(layouts.EXPERTS)]
    for row, wanted in zip(run, single, strict=True):
        for key in ("loss", "grad_norm", "aux_loss", *loads):
            assert row[key] == pytest.approx(wanted[key], rel=1e-9), (row["step"], key)
        assert sum(row[key] for key in loads) == pytest.approx(1)
    exports = [exported(path) for path in (one, four)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[1].items():
        torch.testing.assert_close(tensor, exports[0][name], rtol=1e-6, atol=1e-8, msg=name)


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The tensors that `zoo export` makes of a run."""
    zoo("export", run, "--to", "hf", run / "hf")
    return {name: t for file in (run / "hf").glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llama3", "--ep", 2), ("--ep 2", "llama3 has none", "--ep 1")),
        (("mixtral", *AUX, "--set", "data.micro_batch=2"), ("data.micro_batch=1", "output_router_logits=false")),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_one_line_before_any_process_starts(arguments, words, checkpoint, tmp_path):
    source = ("--from", checkpoint) if arguments[0] == "mixtral" else ()
    _, err = zoo("finetune", *arguments, *source, "--data", "stdlib", "--out", tmp_path / "run", status=2)
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
