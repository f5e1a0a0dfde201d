"""`zoo import` and `zoo export` as a user types them."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conversion.test_run import run  # noqa: F401
from zoo.cli.main import main
from zoo.conversion.hf import hub


@pytest.fixture
def zoo(capsys):
    """Status, what was printed, and what was said."""

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


def refused(result, *words) -> None:
    status, out, err = result
    assert status in (2, 5), err
    assert out == ""
    assert err.count("\n") == 1
    assert all(str(word) in err for word in words), err


def test_import_copies_a_checked_directory(zoo, sharded, tmp_path):
    status, out, err = zoo("import", sharded, tmp_path / "in" / "here")
    assert (status, out) == (0, f"{tmp_path / 'in' / 'here'}\n")
    assert "21 tensors" in err
    assert "verified" in err
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "in/here", output_loading_info=True)
    assert not any(report.values())
    before = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (tmp_path / "in/here/tokenizer.json").read_bytes() == (sharded / "tokenizer.json").read_bytes()


def test_export_of_a_run(zoo, run, checkpoint):  # noqa: F811
    status, out, _ = zoo("export", run, "--to", "hf")
    assert (status, out) == (0, f"{run / 'hf'}\n")
    model, report = AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not any(report.values())
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    refused(zoo("export", run), "hf is not empty")


def test_export_of_one_checkpoint_and_of_a_directory(zoo, run, checkpoint, tmp_path):  # noqa: F811
    status, _, said = zoo("export", run / "checkpoints/step-2")
    assert status == 0
    assert f"; from {run}/checkpoints/step-2" in said
    assert (run / "hf/config.json").exists()
    assert zoo("export", checkpoint, tmp_path / "small", "--dtype", "bfloat16")[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "small/model.safetensors").values()} == {torch.bfloat16}
    refused(zoo("export", checkpoint), "say where to write", f"zoo export {checkpoint} --to hf OUT")


def test_a_checkpoint_that_does_not_fit_its_config(zoo, checkpoint, tmp_path):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(zoo("import", checkpoint, tmp_path / "out"), checkpoint, "lacks model.layers.2.")
    file.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(zoo("import", checkpoint, tmp_path / "out"), checkpoint, "has model.layers.1.")
    file.write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(zoo("import", checkpoint, tmp_path / "out"), "mlp.gate_proj.weight is [48, 32] and not [64, 32]")
    file.write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    refused(zoo("import", checkpoint, tmp_path / "out"), "num_hidden_layers", "1024")
    file.write_text(json.dumps(config | {"model_type": "gru"}))
    refused(zoo("import", checkpoint, tmp_path / "out"), "gru", "zoo models")
    assert not (tmp_path / "out").exists()


def test_tied_weights_in_the_file_twice(zoo, checkpoint, tmp_path):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    refused(zoo("import", checkpoint, tmp_path / "out"), "lm_head.weight differs from model.embed_tokens.weight")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert zoo("import", checkpoint, tmp_path / "out")[0] == 0
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_old_frequencies_are_left_out(zoo, checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert zoo("import", checkpoint, tmp_path / "out")[0] == 0
    assert len(load_file(tmp_path / "out/model.safetensors")) == 21


def test_sources_that_are_not_there(zoo, tmp_path, monkeypatch):
    refused(zoo("import", tmp_path / "nothing", tmp_path / "out"), "nothing")
    refused(zoo("import", tmp_path, tmp_path / "out"), tmp_path)

    def offline(*_args, **_kwargs):
        raise hub.LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    refused(zoo("import", "owner/name", tmp_path / "out"), "owner/name", "hf download owner/name --local-dir DIR")


def test_the_hub_gives_a_directory(zoo, checkpoint, tmp_path, monkeypatch):
    asked = {}

    def download(hub_id, **patterns):
        asked.update(patterns, id=hub_id)
        return str(checkpoint)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert zoo("import", "owner/name", tmp_path / "out")[0] == 0
    assert asked["id"] == "owner/name"
    wanted = ["config.json", "vocab.txt", "spiece.model", "LICENSE", "Notice.md", "additional_chat_templates/a.jinja"]
    others = ["modeling.py", "LICENSE.py", "notice.bin", "pytorch_model.bin", "README.md", "adapter_model.safetensors"]
    others += [f"{folder}/config.json" for folder in ("original", "add", "additional_chat_templates2", "a/b")]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


@pytest.mark.parametrize("name", ["../up", "a/b/c", "/abs/path", "plain", "a/..", "a b/c", ""])
def test_what_is_no_hub_id(name):
    assert not hub.is_hub_id(name)


def test_an_unknown_form(zoo, run):  # noqa: F811
    refused_status, _, err = zoo("export", run, "--to", "hff")
    assert refused_status != 0
    assert "hf" in err
