"""Checkpoints whose tensors do not fit: one line with the cause and what to type, whoever reads them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model as save_one_of_two
from transformers import AutoModelForCausalLM

import zoo
from tests.conversion.conftest import save_model
from zoo.cli.main import main
from zoo.core.errors import DataError
from zoo.core.model.misfit import why_names_differ


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory):
    """transformers' model, and the directory it saved itself into."""
    folder = save_model(tmp_path_factory.mktemp("model") / "source", tie_word_embeddings=request.param)
    return AutoModelForCausalLM.from_pretrained(folder), folder


def lora_names(model):
    named = {}
    for name, tensor in model.state_dict().items():
        named[f"base_model.model.{name.replace('q_proj', 'q_proj.base_layer')}"] = tensor
    return named | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)}


def renamed(old, new, *, every=True):
    def save(model):
        return {
            new + name.removeprefix(old) if every or name.startswith(old) else name: tensor
            for name, tensor in model.state_dict().items()
        }

    return save


SAVES = {
    "module": (lambda m: torch.nn.DataParallel(m).state_dict(), ["begin with 'module.'", "model.module"]),
    "_orig_mod": (renamed("", "_orig_mod."), ["begin with '_orig_mod.'", "torch.compile", "model._orig_mod"]),
    "both": (renamed("", "module._orig_mod."), ["'module._orig_mod.'", "torch.compile", "model.module"]),
    "blocks": (
        renamed("model.layers.0.", "model.layers.0._orig_mod.", every=False),
        ["hold '._orig_mod.'", "torch.compile"],
    ),
    "peft": (renamed("", "base_model.model."), ["begin with 'base_model.model.'", "peft", "merge_and_unload()"]),
    "lora": (lora_names, ["adapter that was not merged", "lora_A", "merge_and_unload()"]),
    "doubled": (renamed("", "model."), ["begin with 'model.' (model.model.", "k.replace('model.', '', 1)"]),
    "other": (renamed("model.", "trunk.", every=False), ["'trunk.'", "k.replace('trunk.', 'model.', 1)"]),
    "multimodal": (renamed("", "language_model."), ["'language_model.'", "k.replace('language_model.', '', 1)"]),
    "inner": (lambda m: m.model.state_dict(), ["begin without 'model.'", "where model."]),
    "inner and head": (renamed("model.", "", every=False), ["begin without 'model.'", "else 'model.' + k"]),
}


def saved_as(source, out, tensors):
    out.mkdir()
    unshared = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(unshared, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    return out


def refusals(folder, capsys):
    """What each that reads a checkpoint says of one; its tensors are never trusted further by any."""
    out = folder.parent / "out"
    data = ("--data", __file__, "--seq", "64", "--out", out)
    commands = [("import", folder, out), ("export", folder, out)]
    commands += [(name, "llama3", "--from", folder, *data) for name in ("plan", "finetune")]
    for command in commands:
        capsys.readouterr()
        assert main([str(word) for word in command]) == 5, command
        said = capsys.readouterr().err
        assert "Traceback" not in said
        (line,) = (line for line in said.splitlines() if line.startswith("Error"))
        yield line.removeprefix("Error: ")
    with pytest.raises(DataError) as error:
        zoo.load(folder)
    yield str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("how", SAVES)
def test_names_under_another_prefix_are_one_cause(model, tmp_path, how, capsys):
    save, words = SAVES[how]
    folder = saved_as(model[1], tmp_path / "source", save(model[0]))
    said = set(refusals(folder, capsys))
    assert len(said) == 1, said
    line = said.pop()
    assert all(word in line for word in (*words, str(folder))), line
    assert line.isprintable()
    assert len(line) < 600
    assert "lacks" not in line


@pytest.mark.parametrize("how", ["doubled", "other", "multimodal", "inner and head"])
def test_the_renaming_that_is_advised_makes_it_load(model, tmp_path, how):
    folder = saved_as(model[1], tmp_path / "source", SAVES[how][0](model[0]))
    with pytest.raises(DataError) as error:
        zoo.load(folder)
    advised = "{" + str(error.value).partition(", {")[2].partition("}")[0] + "}"
    file = folder / "model.safetensors"
    save_file(eval(advised, {"load_file": load_file, "FILE": file}), file, metadata={"format": "pt"})
    loaded = zoo.load(folder)
    assert all(torch.equal(tensor, loaded.get_parameter(name)) for name, tensor in model[0].named_parameters())


@pytest.mark.parametrize("names", [["a.b.c"], ["model.layers.0.w", "extra.x"], [], ["w"]])
def test_names_without_a_cause_have_none(names):
    assert why_names_differ("x", names, ["model.layers.0.w", "model.layers.1.w", "model.norm.weight"]) is None


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_head_that_is_not_there_means_the_setting(tmp_path, capsys):
    folder = save_model(tmp_path / "source", tie_word_embeddings=True)
    edit(folder, tie_word_embeddings=False)
    for line in refusals(folder, capsys):
        assert "lacks lm_head.weight" in line
        assert "a model with tie_word_embeddings true, and its config.json says false" in line
        assert "--set model.tie_word_embeddings=true" in line
    how = ("--from", folder, "--data", __file__, "--seq", "64", "--set", "model.tie_word_embeddings=true")
    assert main([str(word) for word in ("plan", "llama3", *how)]) == 0


def test_a_head_of_its_own_means_the_setting(tmp_path, capsys):
    folder = save_model(tmp_path / "source")
    edit(folder, tie_word_embeddings=True)
    for line in refusals(folder, capsys):
        assert "says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight" in line
        assert "--set model.tie_word_embeddings=false" in line


def test_a_tied_model_of_which_a_save_kept_one_name(tmp_path, capsys):
    folder = save_model(tmp_path / "source", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_one_of_two(model, folder / "model.safetensors")  # safetensors' own way to save what is shared
    if "lm_head.weight" not in load_file(folder / "model.safetensors"):
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        save_file(weights, folder / "model.safetensors")
    for line in refusals(folder, capsys):
        assert "model.embed_tokens.weight is there under its second name only, lm_head.weight" in line


def test_an_embedding_of_more_rows_means_the_setting(tmp_path, capsys):
    folder = save_model(tmp_path / "source", vocab_size=264)
    edit(folder, vocab_size=259)
    for line in refusals(folder, capsys):
        assert "a model with vocab_size 264, and its config.json says 259" in line
        assert "--set model.vocab_size=264" in line


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "beside weights"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_named_as_one(tmp_path, capsys, name, kept):
    folder = save_model(tmp_path / "source")
    if not kept:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    (folder / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}))
    for line in refusals(folder, capsys):
        assert ("has weights and an adapter beside them" if kept else "is an adapter") in line
        assert "merge_and_unload().save_pretrained('MERGED')" in line
        assert kept or name != "adapter_config.json" or "of owner/base" in line


QUANTISED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize()"),
    "bitsandbytes by its old config": ({"load_in_8bit": True}, "(bitsandbytes)"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "(gptq)"),
    "awq": ({"quant_method": "awq", "bits": 4}, "(awq)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "(compressed-tensors)"),
    "one that is odd": ({"quant_method": "a\nb"}, "does not name"),
    "one that is none": (7, "does not name"),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_weights_are_named_with_what_makes_plain_ones_of_them(tmp_path, capsys, how):
    said, word = QUANTISED[how]
    folder = save_model(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors")
    edit(folder, quantization_config=said)
    for line in refusals(folder, capsys):
        assert "quantization_config says that the weights are quantised" in line
        assert word in line
        assert "use the checkpoint that they were made from" in line
        assert len(line) < 600
