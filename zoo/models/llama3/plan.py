"""What may be cut in a Llama, and what a token of it costs."""

from __future__ import annotations

from zoo.core.contracts import ParallelPlan
from zoo.models.llama3.config import LlamaConfig

_LAYER = "model.layers.*"


def plan(_config: LlamaConfig) -> ParallelPlan:
    """The head is cut along the vocabulary like the embedding, so that tied weights agree."""
    return ParallelPlan(
        block=_LAYER,
        tensor={
            "model.embed_tokens": "vocab",
            f"{_LAYER}.input_layernorm": "sequence",
            f"{_LAYER}.self_attn.q_proj": "colwise",
            f"{_LAYER}.self_attn.k_proj": "colwise",
            f"{_LAYER}.self_attn.v_proj": "colwise",
            f"{_LAYER}.self_attn.o_proj": "rowwise",
            f"{_LAYER}.post_attention_layernorm": "sequence",
            f"{_LAYER}.mlp.gate_proj": "colwise",
            f"{_LAYER}.mlp.up_proj": "colwise",
            f"{_LAYER}.mlp.down_proj": "rowwise",
            "model.norm": "sequence",
            "lm_head": "vocab",
        },
        seams={
            "attention": f"{_LAYER}.self_attn.core",
            "block": "model.run_block",
            "mlp": f"{_LAYER}.run_mlp",
            "loss": "loss",
        },
        first=("model.embed_tokens",),
        last=("model.norm", "lm_head", "loss"),
    )


def flops_per_token(config: LlamaConfig, mean_visible_keys: float) -> float:
    """Forward plus backward FLOPs of one token, by the convention of PaLM's appendix B (2204.02311).

    A multiply-add is 2. Backward is twice forward: 6 a matrix weight (the head counts, the embedding look-up
    does not), and 12 * N * H a layer for each key the token really sees (QK and PV, 2 * N * H each, times 3).
    Recomputation is not counted, for it is not the model's work.
    """
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 2 * config.hidden_size * (queries + keys)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_hidden_layers * queries * mean_visible_keys
