"""What every decoder's config.json says in the same words: read, checked, written, changed. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from zoo import DataError
from zoo.models.common.fields import Fields
from zoo.models.common.rope_parameters import RopeParameters, hub_rope, override_rope, parse_rope, rope_for_length

# Caps far above any published model, so that a hostile file cannot ask for memory.
MAX_LENGTH = 1 << 32
"""The largest number of positions that a config.json may ask for."""
MAX_LAYERS = 1 << 10
"""The largest number of layers that a config.json may ask for."""
MAX_WIDTH = 1 << 20
"""The largest width that a config.json may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Hyper-parameters of any decoder, under the hub's names; `rope_parameters` holds theta too, as transformers 5."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    initializer_range: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What transformers takes for fields that a config.json leaves out."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    rope_theta: float = 10_000.0
    partial_rotary_factor: float | None = None
    """None for families that always rotate whole heads."""


def read_decoder(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """The arguments of a DecoderConfig. Raises DataError.

    Fields that would change the function and no family here implements (quantisation, dropout) are refused,
    unknown ones are ignored.
    """
    fields.fixed("attention_dropout", 0, 0.0, hint="training here drops nothing; write 0 there to train without")
    if fields.has("quantization_config"):
        raise DataError(
            "config.json: quantization_config is set: quantised weights cannot be trained; "
            "point --from at the original bfloat16 checkpoint"
        )
    heads = fields.integer("num_attention_heads", defaults.num_attention_heads, high=1 << 12)
    hidden = fields.integer("hidden_size", defaults.hidden_size, high=1 << 17)
    length = fields.integer("max_position_embeddings", defaults.max_position_embeddings, high=MAX_LENGTH)
    head_dim = fields.integer("head_dim", max(hidden // heads, 1), low=2, high=1 << 12)
    rope = parse_rope(
        fields.values,
        default_theta=defaults.rope_theta,
        max_position_embeddings=length,
        default_partial=defaults.partial_rotary_factor,
    )
    _check_rotated(rope, head_dim)
    return {
        "vocab_size": fields.integer("vocab_size", defaults.vocab_size, high=1 << 22),
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("num_hidden_layers", defaults.num_hidden_layers, high=MAX_LAYERS),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "initializer_range": fields.number("initializer_range", defaults.initializer_range, high=1.0),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
        "bos_token_id": fields.token("bos_token_id", defaults.bos_token_id),
        "eos_token_id": fields.tokens("eos_token_id", defaults.eos_token_id),
        "pad_token_id": fields.token("pad_token_id", None),
        "rope_parameters": rope,
    }


def read_kv_heads(fields: Fields, heads: int, absent: int | None = None) -> int:
    """`num_key_value_heads`; null means as many as query heads, absence `absent` (the same if None).

    Raises DataError unless it divides `heads`.
    """
    default = heads if absent is None or "num_key_value_heads" in fields.values else absent
    kv_heads = fields.integer("num_key_value_heads", default, high=heads)
    if heads % kv_heads:
        raise DataError(
            f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    return kv_heads


def _check_rotated(rope: RopeParameters, head_dim: int) -> None:
    least, rotated = 4 if rope.rope_type == "dynamic" else 2, rope.rotated(head_dim)
    if rotated % 2 or rotated < least:
        part = f" of which {rotated} are rotated" if rotated != head_dim else ""
        raise DataError(
            f"config.json: head_dim ({head_dim}){part} must be even and at least {least} for RoPE, "
            f"and so must be head_dim * partial_rotary_factor"
        )


def hub_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `read_decoder`, RoPE in every form that transformers 4 and 5 read."""
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        **hub_rope(config.rope_parameters, max_position_embeddings=config.max_position_embeddings),
    }


def override_decoder(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A hub config's fields with some set anew and those on RoPE and heads made to agree.

    Heads follow the width unless they were set apart from it: a derived `head_dim` is derived again, a model
    without grouped heads stays one.
    """
    changed = {**override_rope(fields, over), **over}
    derived = fields["hidden_size"] == fields["num_attention_heads"] * fields["head_dim"]
    if derived and "head_dim" not in over:
        del changed["head_dim"]
    if fields["num_key_value_heads"] == fields["num_attention_heads"] and "num_key_value_heads" not in over:
        changed["num_key_value_heads"] = None
    return changed


def decoder_for_length(config: DecoderConfig, length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens."""
    return rope_for_length(config.rope_parameters, native=config.max_position_embeddings, length=length)


class _Attention(Protocol):
    """Of a config, what its attention's weights depend on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def attention_weights(config: _Attention) -> int:
    """Values in the four projections of one attention layer, biases left out."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return 2 * config.hidden_size * heads * config.head_dim


def attention_biases(config: _Attention) -> int:
    """Values in the biases of the four projections."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * config.head_dim + config.hidden_size


def end_weights(config: DecoderConfig) -> int:
    """Values in embedding and head, tied ones counted once."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
