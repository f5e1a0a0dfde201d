"""Mixtral (2401.04088): the shared decoder with RMSNorm, grouped-query attention, and experts that tokens choose."""

from __future__ import annotations

from functools import partial

from zoo import ModelSpec
from zoo.models.common import (
    Attention,
    RMSNorm,
    SparseCausalLM,
    SparseDecoder,
    SparseDecoderLayer,
    SparseMoE,
    decoder_of,
    init_buffers,
    init_experts,
    init_weights,
)
from zoo.models.mixtral.config import MixtralConfig, hub_config, override, parse
from zoo.models.mixtral.plan import experts, flops_per_token, plan
from zoo.models.mixtral.rules import forms, rules
from zoo.models.mixtral.sizes import MODEL_TYPE


def build(config: MixtralConfig) -> SparseCausalLM:
    """The model on the current default device and dtype, weights normal(0, initializer_range)."""
    norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    decoder = decoder_of(config, SparseDecoder, layer=partial(_layer, config), norm=norm)
    model = SparseCausalLM(
        decoder,
        tie_word_embeddings=config.tie_word_embeddings,
        num_experts_per_tok=config.num_experts_per_tok,
        balance_coefficient=config.balance_coefficient,
    )
    init_weights(model, std=config.initializer_range)
    init_experts(model, std=config.initializer_range)
    return model


def _layer(config: MixtralConfig, _index: int) -> SparseDecoderLayer:
    return SparseDecoderLayer(
        self_attn=Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=False,
            window=config.sliding_window,
        ),
        block_sparse_moe=SparseMoE(
            config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
        ),
        input_layernorm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        post_attention_layernorm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
    )


SPEC = ModelSpec(
    name="mixtral",
    model_type=MODEL_TYPE,
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    experts=experts,
    windows=lambda config: (config.sliding_window,) * config.num_hidden_layers,
    rules=rules,
    forms=forms,
    override=override,
    init_buffers=init_buffers,
)
