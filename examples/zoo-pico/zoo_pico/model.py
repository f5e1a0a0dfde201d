"""A family of its own: single-device torch code, and what the engine must know about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from zoo import ModelSpec, ParallelPlan
from zoo.models.common import (
    Attention,
    CausalLM,
    Decoder,
    DecoderLayer,
    Fields,
    RMSNorm,
    RopeParameters,
    RotaryEmbedding,
    init_weights,
)


@dataclass(frozen=True, kw_only=True)
class PicoConfig:
    """config.json's fields; nothing else is configurable."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def parse(config: Mapping[str, Any]) -> PicoConfig:
    """Raises DataError for a field of the wrong type or out of range."""
    fields = Fields(config)
    return PicoConfig(**{name: fields.integer(name, 1, high=1 << 20) for name in PicoConfig.__dataclass_fields__})


def hub_config(config: PicoConfig) -> dict[str, Any]:
    return {"model_type": "pico", **asdict(config)}


class SquaredReLU(nn.Module):
    """down(relu(up(h)) ** 2)"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(functional.relu(self.up_proj(h)).square())


def _layer(config: PicoConfig, _index: int) -> DecoderLayer:
    return DecoderLayer(
        self_attn=Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=False,
        ),
        mlp=SquaredReLU(config.hidden_size),
        input_layernorm=RMSNorm(config.hidden_size, eps=1e-5),
        post_attention_layernorm=RMSNorm(config.hidden_size, eps=1e-5),
    )


def build(config: PicoConfig) -> CausalLM:
    decoder = Decoder(
        embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
        num_layers=config.num_hidden_layers,
        layer=partial(_layer, config),
        norm=RMSNorm(config.hidden_size, eps=1e-5),
        rotary_emb=RotaryEmbedding(
            RopeParameters(), head_dim=config.head_dim, max_position_embeddings=config.max_position_embeddings
        ),
    )
    model = CausalLM(decoder, tie_word_embeddings=True)
    init_weights(model, std=0.02)
    return model


def init_buffers(model: nn.Module, _config: PicoConfig) -> None:
    model.model.rotary_emb.reset_buffers()


def plan(_config: PicoConfig) -> ParallelPlan:
    layer = "model.layers.*"
    return ParallelPlan(
        block=layer,
        seams={
            "attention": f"{layer}.self_attn.core",
            "block": "model.run_block",
            "mlp": f"{layer}.run_mlp",
            "loss": "loss",
        },
        first=("model.embed_tokens",),
        last=("model.norm", "lm_head", "loss"),
    )


def flops_per_token(config: PicoConfig, mean_visible_keys: float) -> float:
    width, layers = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    weights = layers * (2 * width * width + 2 * width * keys + 8 * width * width) + config.vocab_size * width
    return 6.0 * weights + 12.0 * layers * width * mean_visible_keys


SPEC = ModelSpec(
    name="pico",
    model_type="pico",
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    init_buffers=init_buffers,
)
