"""What may be cut in a Mixtral, and what a token of it costs."""

from __future__ import annotations

from zoo import ExpertShape, ParallelPlan
from zoo.models.common import LAYER, attention_weights, decoder_plan, train_flops
from zoo.models.mixtral.config import MixtralConfig, expert_weights

_MOE = f"{LAYER}.block_sparse_moe"


def plan(_config: MixtralConfig) -> ParallelPlan:
    """Experts are dealt out whole, so none of their matrices is cut."""
    return decoder_plan(
        {"post_attention_layernorm": "sequence"},
        expert=(f"{_MOE}.experts",),
        seams={
            "dispatch": f"{_MOE}.dispatch",
            "grouped_matmul": f"{_MOE}.experts.matmul",
            "layer_sum": "layer_sum",
            "row_sum": "row_sum",
            "row_part": "model.row_part",
        },
    )


def experts(config: MixtralConfig) -> ExpertShape:
    return ExpertShape(
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        per_token=config.num_experts_per_tok,
    )


def flops_per_token(config: MixtralConfig, mean_visible_keys: float) -> float:
    """Forward plus backward, as `train_flops` counts; of the experts, those that a token goes to."""
    router = config.hidden_size * config.num_local_experts
    layer = attention_weights(config) + router + config.num_experts_per_tok * expert_weights(config)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    return train_flops(weights, config.num_hidden_layers * heads, mean_visible_keys)
