"""What may be cut in a Nemotron-NAS, and what a token of it costs."""

from __future__ import annotations

from zoo import ParallelPlan, SeamName, TensorStyle
from zoo.models.common import LAYER, decoder_plan, train_flops
from zoo.models.nemotron_nas.config import NemotronNasConfig, block_weights, heads


def plan(config: NemotronNasConfig) -> ParallelPlan:
    """Only what some block has. A linear stand-in sees tokens one by one, as norms do."""
    blocks = config.block_configs
    styles: dict[str, TensorStyle] = {}
    seams: dict[SeamName, str] = {}
    if any(block.intermediate_size is not None for block in blocks):
        styles |= {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
    if any(block.linear_attention for block in blocks):
        styles["self_attn.linear_attn"] = "sequence"
    if any(block.linear_mlp for block in blocks):
        styles["mlp.linear_mlp"] = "sequence"
    if any(block.intermediate_size is not None or block.linear_mlp for block in blocks):
        styles["post_attention_layernorm"] = "sequence"
        seams["mlp"] = f"{LAYER}.run_mlp"
    return decoder_plan(styles, seams=seams)


def flops_per_token(config: NemotronNasConfig, mean_visible_keys: float) -> float:
    """Forward plus backward, as `train_flops` counts."""
    weights = sum(block_weights(config, block) for block in config.block_configs)
    width = sum(shape.num_heads * shape.head_dim for shape in heads(config))
    return train_flops(weights + config.vocab_size * config.hidden_size, width, mean_visible_keys)
