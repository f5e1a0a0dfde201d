"""Commands on a model of some thousand weights, in this process: a run of a few steps takes half a second."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tools.made_tokenizer import write_tokenizer
from zoo.cli.main import main
from zoo.models.llama3.model import SPEC

FIELDS = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def llama(folder, layers=2):
    """A directory that `--from` takes, with a tokenizer and a chat template."""
    torch.manual_seed(layers)
    config = SPEC.parse({"model_type": "llama"} | FIELDS | {"num_hidden_layers": layers})
    write_tokenizer(folder, "llama3")
    (folder / "config.json").write_text(json.dumps(SPEC.hub_config(config)))
    save_file(dict(SPEC.build(config).named_parameters()), folder / "model.safetensors")
    return folder


def completions(path, sizes=(1, 2, 1, 2)):
    """A file of samples so many times as long as the first could be."""
    samples = [{"prompt": "Paris " * n, "completion": "is the capital of France " * n} for n in sizes]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def finetune(model, data, out, *args, seq=64):
    """The status of `zoo finetune`."""
    words = ["--from", model, "--data", data, "--seq", seq, "--global-batch", 2, "--out", out, *args]
    return main(["finetune", "llama3", "--set", "log.peak_tflops=1", *map(str, words)])
