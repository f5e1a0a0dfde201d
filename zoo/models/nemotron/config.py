"""The Nemotron family's config: the hub's config.json fields, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo.models.common import (
    MAX_WIDTH,
    DecoderConfig,
    Defaults,
    Fields,
    attention_biases,
    attention_weights,
    decoder_for_length,
    end_weights,
    hub_decoder,
    override_decoder,
    read_decoder,
    read_kv_heads,
)
from zoo.models.nemotron.sizes import MODEL_TYPE

_DEFAULTS = Defaults(
    vocab_size=256_000,
    hidden_size=6144,
    num_hidden_layers=32,
    num_attention_heads=48,
    max_position_embeddings=4096,
    initializer_range=0.0134,
    bos_token_id=2,
    eos_token_id=3,
    partial_rotary_factor=0.5,
)

_LEGACY = {
    "head_dim": ("kv_channels",),
    "norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "partial_rotary_factor": ("rope_percent", "rope_percentage", "rotary_percent", "rope_pct"),
}
"""Names that older converters wrote. transformers ignores them and builds another model than was trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronConfig(DecoderConfig):
    """A decoder's fields, and a Nemotron's own."""

    intermediate_size: int
    num_key_value_heads: int
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool


def parse(config: Mapping[str, Any]) -> NemotronConfig:
    """From any Hugging Face Nemotron config.json, of transformers 4 or 5, or under names of old. Raises DataError.

    Absent fields take transformers' defaults; a null `num_key_value_heads` means as many as query heads, which
    transformers says and fails to do.
    """
    fields = Fields(_modern(config))
    fields.fixed("model_type", MODEL_TYPE)
    fields.fixed("hidden_act", "relu2")
    decoder = read_decoder(fields, _DEFAULTS)
    return NemotronConfig(
        **decoder,
        intermediate_size=fields.integer("intermediate_size", 24_576, high=MAX_WIDTH),
        num_key_value_heads=read_kv_heads(fields, decoder["num_attention_heads"]),
        norm_eps=fields.number("norm_eps", 1e-5, high=1.0),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under today's names, which win where both are there."""
    fields = dict(config)
    for name, older in _LEGACY.items():
        found = next((config[old] for old in older if config.get(old) is not None), None)
        if fields.get(name) is None and found is not None:
            fields[name] = found
    return fields


def hub_config(config: NemotronConfig) -> dict[str, Any]:
    """The fields of a config.json from which transformers 4 and 5 build the same model.

    transformers 4 builds every Nemotron with plain RoPE: a scaled one is for 5 alone.
    """
    return {
        "architectures": ["NemotronForCausalLM"],
        "model_type": MODEL_TYPE,
        **hub_decoder(config),
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "relu2",
        "norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_config`'s fields with some set anew and the rest made to agree. Raises DataError."""
    return hub_config(parse(override_decoder(fields, over)))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens. Raises DataError."""
    return decoder_for_length(parse(config), length)


def num_parameters(config: NemotronConfig) -> int:
    """Values in all weights, tied ones counted once."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = attention_weights(config) + config.attention_bias * attention_biases(config)
    mlp = 2 * width * inner + config.mlp_bias * (inner + width)
    return config.num_hidden_layers * (attention + mlp + 4 * width) + end_weights(config) + 2 * width
