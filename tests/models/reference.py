"""transformers' Llama beside ours: random small configs, the same weights in both."""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.core.weights import ModuleSource, load_into
from zoo.models.llama3.model import SPEC

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def draw_fields(seed: int) -> dict:
    """config.json fields of a small model; the seed runs through RoPE types, biases and ties."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    rope = list(ROPES)[seed % len(ROPES)]
    return {
        "model_type": "llama",
        "vocab_size": draw.choice([97, 256, 515]),
        "hidden_size": heads * draw.choice([8, 12, 20]),
        "intermediate_size": draw.choice([40, 96, 130]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([8, 16, 24]),
        "max_position_embeddings": 256,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "initializer_range": 0.05,
        "tie_word_embeddings": seed % 2 == 0,
        "attention_bias": seed % 3 == 0,
        "mlp_bias": seed % 4 == 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": ROPES[rope] | {"rope_theta": draw.choice([1e4, 5e5])},
    }


def pair(fields: dict, seed: int = 0) -> tuple[LlamaForCausalLM, torch.nn.Module]:
    """transformers' model with perturbed norms and biases, and ours with its weights."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    ours = SPEC.build(SPEC.parse(fields))
    load_into(ours, ModuleSource(theirs), ())
    return theirs, ours
