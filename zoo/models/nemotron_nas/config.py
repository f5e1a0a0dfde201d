"""The config of Llama-Nemotron models found by architecture search: the hub's config.json fields, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo import DataError, HeadShape
from zoo.models.common import (
    DecoderConfig,
    Defaults,
    Fields,
    decoder_for_length,
    end_weights,
    hub_decoder,
    override_decoder,
    read_decoder,
)
from zoo.models.nemotron_nas.blocks import BlockConfig, hub_block, read_blocks
from zoo.models.nemotron_nas.sizes import MODEL_TYPE

_DEFAULTS = Defaults(
    vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronNasConfig(DecoderConfig):
    """A decoder's fields, and what each of its blocks is made of."""

    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    block_configs: tuple[BlockConfig, ...]

    def heads(self, group: int) -> HeadShape:
        """The heads of a block in which so many query heads share a K/V head."""
        kv_heads = self.num_attention_heads // group
        return HeadShape(num_heads=self.num_attention_heads, num_kv_heads=kv_heads, head_dim=self.head_dim)


def parse(config: Mapping[str, Any]) -> NemotronNasConfig:
    """From the config.json of a DeciLM or Llama-Nemotron. Raises DataError.

    Its `auto_map` names code of the checkpoint's own, which is never run and never written again.
    """
    fields = Fields(config)
    fields.fixed("model_type", MODEL_TYPE)
    fields.fixed("hidden_act", "silu")
    decoder = read_decoder(fields, _DEFAULTS)
    if decoder["hidden_size"] % decoder["num_attention_heads"] and not fields.has("head_dim"):
        raise DataError(
            f"config.json: hidden_size ({decoder['hidden_size']}) must be a multiple of num_attention_heads "
            f"({decoder['num_attention_heads']}), or head_dim be given"
        )
    return NemotronNasConfig(
        **decoder,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        block_configs=read_blocks(
            fields,
            num_layers=decoder["num_hidden_layers"],
            num_heads=decoder["num_attention_heads"],
            hidden_size=decoder["hidden_size"],
        ),
    )


def hub_config(config: NemotronNasConfig) -> dict[str, Any]:
    """The fields of a config.json as Llama-Nemotron checkpoints have them; the two nulls are said block by block."""
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        **hub_decoder(config),
        "intermediate_size": None,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "block_configs": [hub_block(block) for block in config.block_configs],
    }


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_config`'s fields with some set anew and the rest made to agree. Raises DataError."""
    return hub_config(parse(override_decoder(fields, over)))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens. Raises DataError."""
    return decoder_for_length(parse(config), length)


def heads(config: NemotronNasConfig) -> tuple[HeadShape, ...]:
    """Of the blocks that have attention."""
    groups = (block.n_heads_in_group for block in config.block_configs)
    return tuple(config.heads(group) for group in groups if group is not None)


def block_weights(config: NemotronNasConfig, block: BlockConfig) -> int:
    """Values in a block's matrices."""
    width, total = config.hidden_size, 0
    if block.n_heads_in_group is not None:
        shape = config.heads(block.n_heads_in_group)
        total += 2 * width * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    if block.intermediate_size is not None:
        total += 3 * width * block.intermediate_size
    return total + (block.linear_attention + block.linear_mlp) * width * width


def num_parameters(config: NemotronNasConfig) -> int:
    """Values in all weights, tied ones counted once."""
    blocks = sum(_block_values(config, block) for block in config.block_configs)
    return blocks + end_weights(config) + config.hidden_size


def _block_values(config: NemotronNasConfig, block: BlockConfig) -> int:
    width, total = config.hidden_size, block_weights(config, block)
    if block.n_heads_in_group is not None and config.attention_bias:
        shape = config.heads(block.n_heads_in_group)
        total += (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim + width
    if block.intermediate_size is not None and config.mlp_bias:
        total += 2 * block.intermediate_size + width
    norms = (block.n_heads_in_group is not None or block.linear_attention) + (
        block.intermediate_size is not None or block.linear_mlp
    )
    return total + norms * width
