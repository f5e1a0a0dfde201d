"""A family of its own: single-device torch code, and what the engine must know about it."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from zoo import ModelSpec, ParallelPlan, Rename, Rule
from zoo.models.common import (
    Attention,
    CausalLM,
    DecoderLayer,
    RMSNorm,
    attention_weights,
    causal_lm,
    decoder_plan,
    init_buffers,
    train_flops,
)
from zoo_pico.config import PicoConfig, hub_config, override, parse


class SquaredReLU(nn.Module):
    """down(relu(up(h)) ** 2)"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.relu(self.up_proj(h)).square())
        return out


def _layer(config: PicoConfig, index: int) -> DecoderLayer:
    return DecoderLayer(
        self_attn=Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=False,
            window=config.windows[index],
        ),
        mlp=SquaredReLU(config.hidden_size),
        input_layernorm=RMSNorm(config.hidden_size, eps=1e-5),
        post_attention_layernorm=RMSNorm(config.hidden_size, eps=1e-5),
    )


def build(config: PicoConfig) -> CausalLM:
    return causal_lm(config, layer=partial(_layer, config), norm=partial(RMSNorm, config.hidden_size, eps=1e-5))


def plan(_config: PicoConfig) -> ParallelPlan:
    """Return how the model may be cut. Attention, norms, embedding and head are as in every decoder."""
    return decoder_plan(
        {"post_attention_layernorm": "sequence", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
    )


def rules(_config: PicoConfig) -> tuple[Rule, ...]:
    """Return which weights have other names on disk; zoo reads and writes them by these rules."""
    layer = "model.layers.{i}.mlp"
    return (
        Rename(ours=f"{layer}.up_proj.weight", hub=f"{layer}.c_fc.weight"),
        Rename(ours=f"{layer}.down_proj.weight", hub=f"{layer}.c_proj.weight"),
    )


def flops_per_token(config: PicoConfig, mean_visible_keys: float) -> float:
    layer = attention_weights(config) + 8 * config.hidden_size**2
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return train_flops(weights, width, mean_visible_keys)


SPEC = ModelSpec(
    name="pico",
    model_type="pico",
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    windows=lambda config: config.windows,
    rules=rules,
    override=override,
    init_buffers=init_buffers,
)
