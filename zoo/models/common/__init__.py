"""Parts from which a model family is built, in the hub's names. Names are imported when they are first used.

Public, as `zoo` is: a family imports from these two packages only (docs/stability.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.public_names import Groups, lazy_getattr, modules_of

if TYPE_CHECKING:
    from zoo.models.common.attention import (
        Attention as Attention,
        AttentionCore as AttentionCore,
    )
    from zoo.models.common.decoder import (
        CausalLM as CausalLM,
        Decoder as Decoder,
        DecoderLayer as DecoderLayer,
        RunBlock as RunBlock,
        causal_lm as causal_lm,
        decoder_of as decoder_of,
        init_buffers as init_buffers,
        init_weights as init_weights,
    )
    from zoo.models.common.decoder_config import (
        MAX_LAYERS as MAX_LAYERS,
        MAX_LENGTH as MAX_LENGTH,
        MAX_WIDTH as MAX_WIDTH,
        DecoderConfig as DecoderConfig,
        Defaults as Defaults,
        attention_biases as attention_biases,
        attention_weights as attention_weights,
        decoder_for_length as decoder_for_length,
        end_weights as end_weights,
        hub_decoder as hub_decoder,
        override_decoder as override_decoder,
        read_decoder as read_decoder,
        read_kv_heads as read_kv_heads,
    )
    from zoo.models.common.embedded import (
        embedded_config as embedded_config,
        embedded_sizes as embedded_sizes,
    )
    from zoo.models.common.family import (
        TINY_RECIPE as TINY_RECIPE,
        Family as Family,
    )
    from zoo.models.common.fields import (
        Fields as Fields,
    )
    from zoo.models.common.loss import (
        TokenLoss as TokenLoss,
    )
    from zoo.models.common.mlp import (
        RunMLP as RunMLP,
        SquaredReLU as SquaredReLU,
        SwiGLU as SwiGLU,
    )
    from zoo.models.common.moe import (
        Dispatch as Dispatch,
        Experts as Experts,
        GroupedMatmul as GroupedMatmul,
        LayerSum as LayerSum,
        RowPart as RowPart,
        RowSum as RowSum,
        SparseMoE as SparseMoE,
        balance_loss as balance_loss,
        balance_objection as balance_objection,
        init_experts as init_experts,
        route as route,
    )
    from zoo.models.common.moe_decoder import (
        SparseCausalLM as SparseCausalLM,
        SparseDecoder as SparseDecoder,
        SparseDecoderLayer as SparseDecoderLayer,
    )
    from zoo.models.common.norms import (
        LayerNorm1P as LayerNorm1P,
        RMSNorm as RMSNorm,
    )
    from zoo.models.common.plan import (
        LAYER as LAYER,
        decoder_plan as decoder_plan,
        train_flops as train_flops,
    )
    from zoo.models.common.rope import (
        RotaryEmbedding as RotaryEmbedding,
        rotate as rotate,
    )
    from zoo.models.common.rope_parameters import (
        RopeParameters as RopeParameters,
        dynamic_objection as dynamic_objection,
        hub_rope as hub_rope,
        override_rope as override_rope,
        parse_rope as parse_rope,
        rope_for_length as rope_for_length,
    )

_GROUPS: Groups = {
    "The plugin of a family": {
        "zoo.models.common.embedded": ("embedded_config", "embedded_sizes"),
        "zoo.models.common.family": ("TINY_RECIPE", "Family"),
        "zoo.models.common.moe": ("balance_objection",),
        "zoo.models.common.plan": ("LAYER", "decoder_plan", "train_flops"),
        "zoo.models.common.rope_parameters": ("dynamic_objection",),
    },
    "Reading and writing config.json": {
        "zoo.models.common.decoder_config": (
            "MAX_LAYERS",
            "MAX_LENGTH",
            "MAX_WIDTH",
            "DecoderConfig",
            "Defaults",
            "attention_biases",
            "attention_weights",
            "decoder_for_length",
            "end_weights",
            "hub_decoder",
            "override_decoder",
            "read_decoder",
            "read_kv_heads",
        ),
        "zoo.models.common.fields": ("Fields",),
        "zoo.models.common.rope_parameters": (
            "RopeParameters",
            "hub_rope",
            "override_rope",
            "parse_rope",
            "rope_for_length",
        ),
    },
    "Decoders": {
        "zoo.models.common.attention": ("Attention", "AttentionCore"),
        "zoo.models.common.decoder": (
            "CausalLM",
            "Decoder",
            "DecoderLayer",
            "RunBlock",
            "causal_lm",
            "decoder_of",
            "init_buffers",
            "init_weights",
        ),
        "zoo.models.common.loss": ("TokenLoss",),
        "zoo.models.common.mlp": ("RunMLP", "SquaredReLU", "SwiGLU"),
        "zoo.models.common.norms": ("LayerNorm1P", "RMSNorm"),
        "zoo.models.common.rope": ("RotaryEmbedding", "rotate"),
    },
    "Experts": {
        "zoo.models.common.moe": (
            "Dispatch",
            "Experts",
            "GroupedMatmul",
            "LayerSum",
            "RowPart",
            "RowSum",
            "SparseMoE",
            "balance_loss",
            "init_experts",
            "route",
        ),
        "zoo.models.common.moe_decoder": ("SparseCausalLM", "SparseDecoder", "SparseDecoderLayer"),
    },
}
"""Every public name, once. docs/api.md is written from it, and the imports above repeat it for type checkers."""

_RENAMED: dict[str, str] = {}
"""Deprecated name to its new spelling, for one release."""

# A type checker would take every name that it does not know for `Any`.
if not TYPE_CHECKING:
    __all__ = list(modules_of(_GROUPS))
    __getattr__ = lazy_getattr(__name__, _GROUPS, _RENAMED)

    def __dir__() -> list[str]:
        return sorted(__all__)
