"""Small Hugging Face directories, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

FIELDS = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 257,
    "eos_token_id": [257, 258],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def save_model(directory: Path, *, shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **fields) -> Path:
    """transformers' model of random weights with its files, and a tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS | fields)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory, max_shard_size=shard_size)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<|begin|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    # Odd spacing on purpose: the copy must be of bytes, not of meaning.
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=7) + "\n\n")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.fixture
def checkpoint(tmp_path):
    """One file."""
    return save_model(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    """Several files and an index."""
    directory = save_model(tmp_path / "source", shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return directory
