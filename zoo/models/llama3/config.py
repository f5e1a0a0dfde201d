"""The Llama family's config: the hub's config.json fields, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.core.errors import DataError
from zoo.models.common.fields import Fields
from zoo.models.common.rope_parameters import (
    RopeParameters,
    hub_rope,
    override_rope,
    parse_rope,
    rope_for_length,
)
from zoo.models.llama3.sizes import MODEL_TYPE, MODEL_TYPES
from zoo.models.llama3.windows import hub_windows, override_windows, read_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Hyper-parameters under the hub's names; `rope_parameters` holds theta too, as in transformers 5."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    windows: tuple[int | None, ...]
    """The sliding window of each layer in tokens, the token itself included."""
    model_type: str = MODEL_TYPE
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)


def parse(config: Mapping[str, Any]) -> LlamaConfig:
    """From any Hugging Face Llama, Mistral or Ministral config.json, of transformers 4 or 5. Raises DataError.

    Absent fields take transformers' defaults. Sizes are capped far above any published model, so that a
    hostile file cannot ask for memory. Fields that would change the function and are not implemented
    (quantisation, dropout, other activations) are refused, unknown ones are ignored.
    """
    fields = Fields(config)
    _refuse(fields)
    heads = fields.integer("num_attention_heads", 32, high=1 << 12)
    hidden = fields.integer("hidden_size", 4096, high=1 << 17)
    kind = config.get("model_type") or MODEL_TYPE
    inner, kv_heads, native = (11008, heads, 2048) if kind == MODEL_TYPE else (14336, 8, 131_072)
    length = fields.integer("max_position_embeddings", native, high=1 << 32)
    layers = fields.integer("num_hidden_layers", 32, high=1 << 10)
    parsed = LlamaConfig(
        vocab_size=fields.integer("vocab_size", 32000, high=1 << 22),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", inner, high=1 << 20),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", kv_heads, high=heads),
        head_dim=fields.integer("head_dim", max(hidden // heads, 1), low=2, high=1 << 12),
        max_position_embeddings=length,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        initializer_range=fields.number("initializer_range", 0.02, high=1.0),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        bos_token_id=fields.token("bos_token_id", 1),
        eos_token_id=fields.tokens("eos_token_id", 2),
        pad_token_id=fields.token("pad_token_id", None),
        windows=read_windows(fields, kind, layers),
        model_type=kind,
        rope_parameters=parse_rope(config, default_theta=10_000.0, max_position_embeddings=length),
    )
    _check(parsed)
    return parsed


def _refuse(fields: Fields) -> None:
    fields.fixed("model_type", *MODEL_TYPES)
    fields.fixed("hidden_act", "silu")
    fields.fixed("attention_dropout", 0, 0.0)
    if fields.has("quantization_config"):
        raise DataError(
            "config.json: quantization_config is set: quantised weights cannot be trained; "
            "point --from at the original bfloat16 checkpoint"
        )


def _check(config: LlamaConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads:
        raise DataError(
            f"config.json: hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads ({heads})"
        )
    if heads % kv_heads:
        raise DataError(
            f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    if config.model_type != MODEL_TYPE and (config.attention_bias or config.mlp_bias):
        raise DataError(
            f"config.json: a Llama with a sliding window is the hub's {config.model_type}, which has no biases; "
            f"unset attention_bias and mlp_bias, or sliding_window"
        )
    least = 4 if config.rope_parameters.rope_type == "dynamic" else 2
    if config.head_dim % 2 or config.head_dim < least:
        raise DataError(f"config.json: head_dim ({config.head_dim}) must be even and at least {least} for RoPE")


def hub_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a config.json from which transformers 4 and 5 build the same model."""
    eos = config.eos_token_id
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias, "pretraining_tp": 1}
    return {
        "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        **(biases if config.model_type == MODEL_TYPE else hub_windows(config.windows, config.model_type)),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        **hub_rope(config.rope_parameters, max_position_embeddings=config.max_position_embeddings),
    }


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_config`'s fields with some set anew and the rest made to agree. Raises DataError.

    Heads follow the width unless they were set apart from it: a derived `head_dim` is derived again, a model
    without grouped heads stays one.
    """
    changed = override_windows({**override_rope(fields, over), **over}, over)
    derived = fields["hidden_size"] == fields["num_attention_heads"] * fields["head_dim"]
    if derived and "head_dim" not in over:
        del changed["head_dim"]
    if fields["num_key_value_heads"] == fields["num_attention_heads"] and "num_key_value_heads" not in over:
        del changed["num_key_value_heads"]
    return hub_config(parse(changed))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens. Raises DataError."""
    native = parse(config)
    return rope_for_length(native.rope_parameters, native=native.max_position_embeddings, length=length)


def num_parameters(config: LlamaConfig) -> int:
    """Values in all weights, tied ones counted once."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 2 * width * (queries + keys) + config.attention_bias * (queries + 2 * keys + width)
    mlp = 3 * width * inner + config.mlp_bias * (2 * inner + width)
    ends = config.vocab_size * width * (1 if config.tie_word_embeddings else 2) + width
    return config.num_hidden_layers * (attention + mlp + 2 * width) + ends
