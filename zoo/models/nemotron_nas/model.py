"""Llama-Nemotron by architecture search (DeciLM; 2411.19146): a Llama whose blocks differ, and may lack parts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo import ModelSpec
from zoo.models.common import Attention, CausalLM, RMSNorm, RunMLP, SwiGLU, causal_lm, init_buffers
from zoo.models.nemotron_nas.blocks import BlockConfig
from zoo.models.nemotron_nas.config import NemotronNasConfig, heads, hub_config, override, parse
from zoo.models.nemotron_nas.plan import flops_per_token, plan
from zoo.models.nemotron_nas.sizes import MODEL_TYPE


class LinearAttention(nn.Module):
    """A matrix in place of attention: each token alone."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, h: Tensor, _cos: Tensor, _sin: Tensor, _mask: Any) -> Tensor:
        """h `[B, T, D]` to `[B, T, D]`."""
        out: Tensor = self.linear_attn(h)
        return out


class LinearMLP(nn.Module):
    """A matrix in place of the MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        out: Tensor = self.linear_mlp(h)
        return out


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); a part that is None is left out with its norm."""

    def __init__(self, *, self_attn: nn.Module | None, mlp: nn.Module | None, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        if self_attn is not None:
            self.input_layernorm = RMSNorm(hidden_size, eps=eps)
        if mlp is not None:
            self.post_attention_layernorm = RMSNorm(hidden_size, eps=eps)
            self.run_mlp = RunMLP()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        """h `[B, T, D]`, cos and sin `[B, T, R/2]` to `[B, T, D]`."""
        if self.self_attn is not None:
            h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        if self.mlp is not None:
            h = h + self.run_mlp(self.mlp, self.post_attention_layernorm(h))
        return h


def build(config: NemotronNasConfig) -> CausalLM:
    """The model on the current default device and dtype, weights normal(0, initializer_range)."""
    norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    return causal_lm(config, layer=partial(_layer, config), norm=norm)


def _layer(config: NemotronNasConfig, index: int) -> Block:
    block = config.block_configs[index]
    return Block(
        self_attn=_attention(config, block),
        mlp=_mlp(config, block),
        hidden_size=config.hidden_size,
        eps=config.rms_norm_eps,
    )


def _attention(config: NemotronNasConfig, block: BlockConfig) -> nn.Module | None:
    if block.n_heads_in_group is None:
        return LinearAttention(config.hidden_size) if block.linear_attention else None
    shape = config.heads(block.n_heads_in_group)
    return Attention(
        hidden_size=config.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        bias=config.attention_bias,
    )


def _mlp(config: NemotronNasConfig, block: BlockConfig) -> nn.Module | None:
    if block.intermediate_size is None:
        return LinearMLP(config.hidden_size) if block.linear_mlp else None
    return SwiGLU(config.hidden_size, block.intermediate_size, bias=config.mlp_bias)


SPEC = ModelSpec(
    name="nemotron-nas",
    model_type=MODEL_TYPE,
    parse=parse,
    hub_config=hub_config,
    build=build,
    plan=plan,
    flops_per_token=flops_per_token,
    heads=heads,
    windows=lambda config: [None] * len(heads(config)),
    override=override,
    init_buffers=init_buffers,
)
