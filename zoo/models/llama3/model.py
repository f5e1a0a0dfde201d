"""Llama 3 (2407.21783): the shared decoder with RMSNorm, grouped-query attention and SwiGLU; windows as Mistral's."""

from __future__ import annotations

from functools import partial

from zoo import ModelSpec
from zoo.models.common import Attention, CausalLM, DecoderLayer, RMSNorm, SwiGLU, causal_lm, init_buffers
from zoo.models.llama3.config import LlamaConfig, hub_config, override, parse
from zoo.models.llama3.plan import flops_per_token, plan
from zoo.models.llama3.sizes import MODEL_TYPE


def build(config: LlamaConfig) -> CausalLM:
    """The model on the current default device and dtype, weights normal(0, initializer_range)."""
    norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    return causal_lm(config, layer=partial(_layer, config), norm=norm)


def _layer(config: LlamaConfig, index: int) -> DecoderLayer:
    return DecoderLayer(
        self_attn=Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            window=config.windows[index],
        ),
        mlp=SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
        input_layernorm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        post_attention_layernorm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
    )


SPEC = ModelSpec(
    name="llama3",
    model_type=MODEL_TYPE,
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    windows=lambda config: config.windows,
    optional_fields=("sliding_window", "layer_types"),
    override=override,
    init_buffers=init_buffers,
)
