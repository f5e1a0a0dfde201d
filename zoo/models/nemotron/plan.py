"""What may be cut in a Nemotron, and what a token of it costs."""

from __future__ import annotations

from zoo import ParallelPlan
from zoo.models.common import attention_weights, decoder_plan, train_flops
from zoo.models.nemotron.config import NemotronConfig


def plan(_config: NemotronConfig) -> ParallelPlan:
    return decoder_plan({"post_attention_layernorm": "sequence", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"})


def flops_per_token(config: NemotronConfig, mean_visible_keys: float) -> float:
    """Forward plus backward, as `train_flops` counts."""
    layer = attention_weights(config) + 2 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    return train_flops(weights, config.num_hidden_layers * heads, mean_visible_keys)
