"""Sizes of the family as data. A published one is a table of dozens of blocks, which its own config.json has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPE = "nemotron-nas"
TOKENIZER = str(Path(__file__).parent / "tokenizer")
"""The small one that all tiny sizes have; no trained checkpoint of this family ships with the package."""


def _block(
    group: int | None = None, mult: float | None = None, *, linear: tuple[bool, bool] = (False, False)
) -> dict[str, Any]:
    """Query heads a K/V head and width of the MLP; None and not linear is a no-op."""
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": group is None and not linear[0],
            "replace_with_linear": linear[0],
        },
        "ffn": {"ffn_mult": mult, "no_op": mult is None and not linear[1], "replace_with_linear": linear[1]},
    }


SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "model_type": MODEL_TYPE,
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "block_configs": [
            _block(2, 3.0),
            _block(None, 1.5),
            _block(linear=(True, False)),
            _block(4, linear=(False, True)),
            _block(2, None),
            _block(1, 4.5),
        ],
    }
}
"""config.json's fields: every kind of block once, for trials with random weights."""

PARAMETERS: Mapping[str, int] = {"tiny": 1_156_352}

KV_HEADS: Mapping[str, tuple[int, ...]] = {"tiny": (2, 1, 2, 4)}
"""Of each block with attention; tests hold them against the configs."""
