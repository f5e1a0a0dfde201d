"""The plan and the FLOPs that decoders share: attention, norms and ends are cut alike, whatever feeds forward."""

from __future__ import annotations

from collections.abc import Mapping

from zoo import ParallelPlan, SeamName, TensorStyle

LAYER = "model.layers.*"
"""The blocks of a decoder, as a glob over module names."""
_DENSE: Mapping[SeamName, str] = {"mlp": f"{LAYER}.run_mlp"}


def decoder_plan(
    feed_forward: Mapping[str, TensorStyle],
    *,
    expert: tuple[str, ...] = (),
    seams: Mapping[SeamName, str] = _DENSE,
) -> ParallelPlan:
    """The plan of a decoder.

    `feed_forward` says how the modules after attention are cut, norm included, by their names in a layer, and `seams`
    which seams they have.

    The head is cut along the vocabulary like the embedding, so that tied weights agree.
    """
    return ParallelPlan(
        block=LAYER,
        tensor={
            "model.embed_tokens": "vocab",
            f"{LAYER}.input_layernorm": "sequence",
            f"{LAYER}.self_attn.q_proj": "colwise",
            f"{LAYER}.self_attn.k_proj": "colwise",
            f"{LAYER}.self_attn.v_proj": "colwise",
            f"{LAYER}.self_attn.o_proj": "rowwise",
            **{f"{LAYER}.{name}": style for name, style in feed_forward.items()},
            "model.norm": "sequence",
            "lm_head": "vocab",
        },
        expert=expert,
        seams={
            "attention": f"{LAYER}.self_attn.core",
            "block": "model.run_block",
            "loss": "loss",
            **seams,
        },
        first=("model.embed_tokens",),
        last=("model.norm", "lm_head", "loss"),
    )


def train_flops(weights: int, score_width: int, mean_visible_keys: float) -> float:
    """Forward plus backward FLOPs of one token, by the convention of PaLM's appendix B (2204.02311).

    A multiply-add is 2. Backward is twice forward: 6 for each of the matrix `weights` that a token meets (the head
    counts, the embedding look-up does not), and 12 for each of `score_width`, the query heads' width summed over
    layers, for each key the token really sees (QK and PV, 2 each, times 3). Recomputation is not counted, for it is
    not the model's work.
    """
    return 6.0 * weights + 12.0 * score_width * mean_visible_keys
