"""Nemotron-3 and -4 (2402.16819) and Minitron: the shared decoder with LayerNorm1P, squared ReLU and partial RoPE."""

from __future__ import annotations

from functools import partial

from zoo import ModelSpec
from zoo.models.common import Attention, CausalLM, DecoderLayer, LayerNorm1P, SquaredReLU, causal_lm, init_buffers
from zoo.models.nemotron.config import NemotronConfig, hub_config, override, parse
from zoo.models.nemotron.plan import flops_per_token, plan
from zoo.models.nemotron.sizes import MODEL_TYPE


def build(config: NemotronConfig) -> CausalLM:
    """The model on the current default device and dtype, weights normal(0, initializer_range)."""
    norm = partial(LayerNorm1P, config.hidden_size, eps=config.norm_eps)
    return causal_lm(config, layer=partial(_layer, config), norm=norm)


def _layer(config: NemotronConfig, _index: int) -> DecoderLayer:
    return DecoderLayer(
        self_attn=Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
        ),
        mlp=SquaredReLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
        input_layernorm=LayerNorm1P(config.hidden_size, eps=config.norm_eps),
        post_attention_layernorm=LayerNorm1P(config.hidden_size, eps=config.norm_eps),
    )


SPEC = ModelSpec(
    name="nemotron",
    model_type=MODEL_TYPE,
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    override=override,
    init_buffers=init_buffers,
)
