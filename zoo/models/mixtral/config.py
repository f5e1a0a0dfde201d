"""The Mixtral family's config: the hub's config.json fields, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo import DataError
from zoo.models.common import (
    MAX_LENGTH,
    MAX_WIDTH,
    DecoderConfig,
    Defaults,
    Fields,
    attention_weights,
    decoder_for_length,
    end_weights,
    hub_decoder,
    override_decoder,
    read_decoder,
    read_kv_heads,
)
from zoo.models.mixtral.sizes import MODEL_TYPE

_DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=131_072,
    rope_theta=1_000_000.0,
)
_MAX_EXPERTS = 1 << 10
_MAX_MATRICES = 1 << 14
"""Layers times experts; each has three tensors of its own on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig(DecoderConfig):
    """A decoder's fields, and a Mixtral's own."""

    intermediate_size: int
    """Of one expert."""
    num_key_value_heads: int
    rms_norm_eps: float
    sliding_window: int | None
    """Tokens that a token sees, itself included; None: all before it."""
    num_local_experts: int
    num_experts_per_tok: int
    output_router_logits: bool
    """The hub's word for training on the load-balancing loss."""
    router_aux_loss_coef: float

    @property
    def balance_coefficient(self) -> float | None:
        """What the load-balancing loss is multiplied by; None: it is not trained on."""
        return self.router_aux_loss_coef if self.output_router_logits and self.router_aux_loss_coef > 0 else None


def parse(config: Mapping[str, Any]) -> MixtralConfig:
    """From any Hugging Face Mixtral config.json, of transformers 4 or 5. Raises DataError.

    Absent fields take transformers' defaults. Noise on the router's input is refused: no two layouts would draw the
    same.
    """
    fields = Fields(_modern(config))
    fields.fixed("model_type", MODEL_TYPE)
    fields.fixed("hidden_act", "silu")
    fields.fixed("router_jitter_noise", 0, 0.0)
    decoder = read_decoder(fields, _DEFAULTS)
    most = min(_MAX_EXPERTS, _MAX_MATRICES // decoder["num_hidden_layers"])
    experts = fields.integer("num_local_experts", 8, high=most)
    window = fields.integer("sliding_window", 1, high=MAX_LENGTH) if fields.has("sliding_window") else None
    return MixtralConfig(
        **decoder,
        intermediate_size=fields.integer("intermediate_size", 14_336, high=MAX_WIDTH),
        num_key_value_heads=read_kv_heads(fields, decoder["num_attention_heads"], absent=8),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5, high=1.0),
        sliding_window=window,
        num_local_experts=experts,
        num_experts_per_tok=_top_k(fields, experts),
        output_router_logits=fields.boolean("output_router_logits", False),
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """`num_experts` is transformers' other name for `num_local_experts`."""
    fields = dict(config)
    if fields.get("num_local_experts") is None and fields.get("num_experts") is not None:
        fields["num_local_experts"] = fields["num_experts"]
    return fields


def _top_k(fields: Fields, experts: int) -> int:
    top_k = fields.integer("num_experts_per_tok", 2, high=_MAX_EXPERTS)
    if top_k > experts:
        raise DataError(f"config.json: num_experts_per_tok ({top_k}) is above num_local_experts ({experts})")
    return top_k


def hub_config(config: MixtralConfig) -> dict[str, Any]:
    """The fields of a config.json from which transformers 4 and 5 build the same model."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": MODEL_TYPE,
        **hub_decoder(config),
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": config.output_router_logits,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_jitter_noise": 0.0,
    }


def override(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_config`'s fields with some set anew and the rest made to agree. Raises DataError."""
    return hub_config(parse(override_decoder(fields, over)))


def for_length(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of a config.json to change so that its model takes rows of `length` tokens. Raises DataError."""
    return decoder_for_length(parse(config), length)


def expert_weights(config: MixtralConfig) -> int:
    """Values in the three matrices of one expert."""
    return 3 * config.hidden_size * config.intermediate_size


def num_parameters(config: MixtralConfig) -> int:
    """Values in all weights of every expert, tied ones counted once."""
    width, experts = config.hidden_size, config.num_local_experts
    layer = attention_weights(config) + experts * (width + expert_weights(config)) + 2 * width
    return config.num_hidden_layers * layer + end_weights(config) + width
