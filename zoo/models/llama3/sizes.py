"""The published sizes of the Llama family as data: nothing is parsed or computed when this is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.models.common import embedded_config, embedded_sizes

MODEL_TYPE = "llama"
MODEL_TYPES = ("llama", "mistral", "ministral")
"""What the hub calls this decoder: without windows, with one in every layer, with one in some layers."""
TINY = Path(__file__).parent / "tiny"
"""A small trained checkpoint in the hub's form that ships with the package."""


def _size(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        **more,
    }


def _long(factor: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_TINY_SHAPE = _size(2, 128, 384, 8, vocab_size=2048, num_key_value_heads=4, max_position_embeddings=1024) | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}

_INSTRUCT_EOS = [128_001, 128_008, 128_009]

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": embedded_config(TINY, _TINY_SHAPE),
    "3.2-1b": _size(16, 2048, 8192, 32, head_dim=64, tie_word_embeddings=True, **_long(32.0)),
    "3.2-3b": _size(28, 3072, 8192, 24, head_dim=128, tie_word_embeddings=True, **_long(32.0)),
    "8b": _size(32, 4096, 14_336, 32),
    "70b": _size(80, 8192, 28_672, 64),
    "3.1-8b": _size(32, 4096, 14_336, 32, **_long(8.0)),
    "3.1-70b": _size(80, 8192, 28_672, 64, **_long(8.0)),
    "3.1-405b": _size(126, 16_384, 53_248, 128, **_long(8.0)),
    "3.3-70b": _size(80, 8192, 28_672, 64, eos_token_id=_INSTRUCT_EOS, **_long(8.0)),
}
"""config.json's fields of the published sizes."""

PARAMETERS: Mapping[str, int] = {
    "tiny": 557_696,
    "3.2-1b": 1_235_814_400,
    "3.2-3b": 3_212_749_824,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "3.1-8b": 8_030_261_248,
    "3.1-70b": 70_553_706_496,
    "3.1-405b": 405_853_388_800,
    "3.3-70b": 70_553_706_496,
}
"""Values in all weights, tied ones counted once; tests hold them against `num_parameters`."""

HUB_IDS: Mapping[str, str] = {
    "3.2-1b": "meta-llama/Llama-3.2-1B",
    "3.2-3b": "meta-llama/Llama-3.2-3B",
    "8b": "meta-llama/Meta-Llama-3-8B",
    "70b": "meta-llama/Meta-Llama-3-70B",
    "3.1-8b": "meta-llama/Llama-3.1-8B",
    "3.1-70b": "meta-llama/Llama-3.1-70B",
    "3.1-405b": "meta-llama/Llama-3.1-405B",
    "3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
}

EMBEDDED: Mapping[str, str] = embedded_sizes(TINY)
