"""The Llama family's config: the hub's config.json fields, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoo import DataError
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
from zoo.models.llama3.sizes import MODEL_TYPE, MODEL_TYPES
from zoo.models.llama3.windows import hub_windows, override_windows, read_windows

_LLAMA = Defaults(
    vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048
)
_WINDOWED = replace(_LLAMA, max_position_embeddings=131_072)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """A decoder's fields, and a Llama's own."""

    intermediate_size: int
    num_key_value_heads: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    """The sliding window of each layer in tokens, the token itself included."""
    model_type: str = MODEL_TYPE


def parse(config: Mapping[str, Any]) -> LlamaConfig:
    """From any Hugging Face Llama, Mistral or Ministral config.json, of transformers 4 or 5. Raises DataError.

    Absent fields take transformers' defaults. Fields that would change the function and are not implemented are
    refused, unknown ones are ignored.
    """
    fields = Fields(config)
    fields.fixed("model_type", *MODEL_TYPES)
    fields.fixed("hidden_act", "silu")
    kind = config.get("model_type") or MODEL_TYPE
    defaults, inner, kv_heads = (_LLAMA, 11_008, None) if kind == MODEL_TYPE else (_WINDOWED, 14_336, 8)
    decoder = read_decoder(fields, defaults)
    parsed = LlamaConfig(
        **decoder,
        intermediate_size=fields.integer("intermediate_size", inner, high=MAX_WIDTH),
        num_key_value_heads=read_kv_heads(fields, decoder["num_attention_heads"], kv_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        windows=read_windows(fields, kind, decoder["num_hidden_layers"]),
        model_type=kind,
    )
    _check(parsed)
    return parsed


def _check(config: LlamaConfig) -> None:
    heads = config.num_attention_heads
    if config.hidden_size % heads:
        raise DataError(
            f"config.json: hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads ({heads})"
        )
    if config.model_type != MODEL_TYPE and (config.attention_bias or config.mlp_bias):
        raise DataError(
            f"config.json: a Llama with a sliding window is the hub's {config.model_type}, which has no biases; "
            f"unset attention_bias and mlp_bias, or sliding_window"
        )


def hub_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a config.json from which transformers 4 and 5 build the same model."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias, "pretraining_tp": 1}
    return {
        "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
        "model_type": config.model_type,
        **hub_decoder(config),
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        **(biases if config.model_type == MODEL_TYPE else hub_windows(config.windows, config.model_type)),
    }


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_config`'s fields with some set anew and the rest made to agree. Raises DataError."""
    return hub_config(parse(override_windows(override_decoder(fields, over), over)))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens. Raises DataError."""
    return decoder_for_length(parse(config), length)


def num_parameters(config: LlamaConfig) -> int:
    """Values in all weights, tied ones counted once."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = attention_weights(config) + config.attention_bias * attention_biases(config)
    mlp = 3 * width * inner + config.mlp_bias * (2 * inner + width)
    return config.num_hidden_layers * (attention + mlp + 2 * width) + end_weights(config) + width
