"""The published sizes of the Nemotron family as data: nothing is parsed or computed when this is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.models.common import embedded_config, embedded_sizes

MODEL_TYPE = "nemotron"
TINY = Path(__file__).parent / "tiny"
"""A small trained checkpoint in the hub's form that ships with the package."""


def _size(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": 256_000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **more,
    }


_TINY_SHAPE = _size(2, 128, 384, 4, 2, head_dim=32, vocab_size=2048) | {
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": embedded_config(TINY, _TINY_SHAPE),
    "minitron-4b": _size(32, 3072, 9216, 24, 8),
    "minitron-8b": _size(32, 4096, 16_384, 48, 8),
    "8b": _size(32, 4096, 16_384, 32, 32, initializer_range=0.010),
    "22b": _size(40, 6144, 24_576, 48, 48, initializer_range=0.008),
    "15b": _size(32, 6144, 24_576, 48, 8),
    "340b": _size(96, 18_432, 73_728, 96, 8, head_dim=192, initializer_range=0.0063),
}
"""config.json's fields of the published sizes."""

PARAMETERS: Mapping[str, int] = {
    "tiny": 820_480,
    "minitron-4b": 4_190_509_056,
    "minitron-8b": 8_271_699_968,
    "8b": 8_540_135_424,
    "22b": 21_266_116_608,
    "15b": 15_628_775_424,
    "340b": 341_029_195_776,
}
"""Values in all weights; tests hold them against `num_parameters`."""

HUB_IDS: Mapping[str, str] = {
    "minitron-4b": "nvidia/Minitron-4B-Base",
    "minitron-8b": "nvidia/Minitron-8B-Base",
}

EMBEDDED: Mapping[str, str] = embedded_sizes(TINY)
