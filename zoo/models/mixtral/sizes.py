"""The published sizes of the Mixtral family as data: nothing is parsed or computed when this is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.models.common import embedded_config, embedded_sizes

MODEL_TYPE = "mixtral"
TINY = Path(__file__).parent / "tiny"
"""A small trained checkpoint in the hub's form that ships with the package."""


def _size(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


_TINY_SHAPE = _size(2, 128, 128, 4, vocab_size=2048, num_key_value_heads=2, max_position_embeddings=1024) | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10_000.0,
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": embedded_config(TINY, _TINY_SHAPE),
    "8x3b": _size(32, 2560, 8960, 32),
    "8x7b": _size(32, 4096, 14_336, 32),
    "8x22b": _size(56, 6144, 16_384, 48, vocab_size=32_768, max_position_embeddings=65_536, router_aux_loss_coef=0.001),
}
"""config.json's fields of the published sizes."""

PARAMETERS: Mapping[str, int] = {
    "tiny": 1_149_568,
    "8x3b": 18_305_026_560,
    "8x7b": 46_702_792_704,
    "8x22b": 140_630_071_296,
}
"""Values in all weights, of every expert; tests hold them against `num_parameters`."""

HUB_IDS: Mapping[str, str] = {
    "8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "8x22b": "mistralai/Mixtral-8x22B-v0.1",
}

EMBEDDED: Mapping[str, str] = embedded_sizes(TINY)
