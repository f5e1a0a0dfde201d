"""The config of the family: config.json's fields, read strictly, written, changed. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo.models.common import (
    MAX_LENGTH,
    DecoderConfig,
    Defaults,
    Fields,
    decoder_for_length,
    hub_decoder,
    override_decoder,
    read_decoder,
    read_kv_heads,
)

_DEFAULTS = Defaults(
    vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PicoConfig(DecoderConfig):
    """What every decoder has (widths, RoPE, special tokens), and what is pico's own."""

    num_key_value_heads: int
    sliding_window: int | None
    """How many tokens every other layer sees, from the first layer on; None: all layers see everything."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        return tuple(None if index % 2 else self.sliding_window for index in range(self.num_hidden_layers))


def parse(config: Mapping[str, Any]) -> PicoConfig:
    """Read config.json's fields. Raises DataError for a field of the wrong type or out of range."""
    fields = Fields(config)
    fields.fixed("model_type", "pico")
    decoder = read_decoder(fields, _DEFAULTS)
    windowed = fields.has("sliding_window")
    return PicoConfig(
        **decoder,
        num_key_value_heads=read_kv_heads(fields, decoder["num_attention_heads"]),
        sliding_window=fields.integer("sliding_window", 1, high=MAX_LENGTH) if windowed else None,
    )


def hub_config(config: PicoConfig) -> dict[str, Any]:
    """Return the fields of a config.json that `parse` reads back to the same config."""
    own = {"num_key_value_heads": config.num_key_value_heads, "sliding_window": config.sliding_window}
    return {"model_type": "pico", **hub_decoder(config), **own}


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `hub_config`'s fields with some set anew (`--set model.rope_theta=5e5`) and the rest made to agree."""
    return hub_config(parse(override_decoder(fields, over)))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return the fields to change so that the model takes rows of `length` tokens: its RoPE is stretched."""
    return decoder_for_length(parse(config), length)
