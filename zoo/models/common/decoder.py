"""The pre-norm decoder that the families share: embedding, blocks, final norm, head, in the hub's names.

B rows, T tokens, D model width, R rotated size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.models.common.decoder_config import DecoderConfig
from zoo.models.common.loss import TokenLoss
from zoo.models.common.mlp import RunMLP
from zoo.models.common.rope import RotaryEmbedding


class RunBlock(nn.Module):
    """The seam through which blocks are run: recompute and offload live here. No parameters, holds no block."""

    def forward(self, block: nn.Module, h: Tensor, *args: Any) -> Tensor:
        out: Tensor = block(h, *args)
        return out


class DecoderLayer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(
        self, *, self_attn: nn.Module, mlp: nn.Module, input_layernorm: nn.Module, post_attention_layernorm: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.run_mlp = RunMLP()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        """h `[B, T, D]`, cos and sin `[B, T, R/2]` to `[B, T, D]`."""
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        out: Tensor = h + self.run_mlp(self.mlp, self.post_attention_layernorm(h))
        return out


class Decoder(nn.Module):
    """Tokens to normalised hidden states. Layers are a ModuleDict, so their names survive a pipeline cut."""

    def __init__(
        self,
        *,
        embed_tokens: nn.Embedding,
        num_layers: int,
        layer: Callable[[int], nn.Module],
        norm: nn.Module,
        rotary_emb: RotaryEmbedding,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleDict({str(i): layer(i) for i in range(num_layers)})
        self.norm = norm
        self.rotary_emb = rotary_emb
        self.run_block = RunBlock()

    def forward(self, tokens: Tensor, positions: Tensor | None, mask: Any) -> Tensor:
        """tokens and positions `[B, T]` to `[B, T, D]`. Positions default to 0 to T - 1."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h = self.embed_tokens(tokens)
        cos, sin = self.rotary_emb(positions, h.dtype)
        for layer in self.layers.values():
            h = self.run_block(layer, h, cos, sin, mask)
        out: Tensor = self.norm(h)
        return out


D = TypeVar("D", bound=Decoder)


class CausalLM(nn.Module):
    """A decoder with its head. With tied embeddings `lm_head.weight` *is* `model.embed_tokens.weight`."""

    def __init__(self, model: Decoder, *, tie_word_embeddings: bool) -> None:
        super().__init__()
        vocab_size, hidden_size = model.embed_tokens.weight.shape
        self.model = model
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_word_embeddings:
            self.lm_head.weight = model.embed_tokens.weight
        self.loss = TokenLoss()

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Any = None, labels: Tensor | None = None
    ) -> Tensor:
        """tokens, positions, labels `[B, T]` to logits `[B, T, V]`, or with labels to the sum of token losses, 0-dim.

        Labels are shifted already: the label of a row is the token that follows it, or IGNORE.
        """
        h = self.model(tokens, positions, mask)
        out: Tensor = self.lm_head(h) if labels is None else self.loss(h, self.lm_head.weight, labels)
        return out


def decoder_of(
    config: DecoderConfig, kind: type[D], *, layer: Callable[[int], nn.Module], norm: Callable[[], nn.Module]
) -> D:
    """A decoder with the embedding and RoPE of a config, on the current default device and dtype."""
    return kind(
        embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
        num_layers=config.num_hidden_layers,
        layer=layer,
        norm=norm(),
        rotary_emb=RotaryEmbedding(
            config.rope_parameters,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
        ),
    )


def causal_lm(config: DecoderConfig, *, layer: Callable[[int], nn.Module], norm: Callable[[], nn.Module]) -> CausalLM:
    """The dense model of a config, weights normal(0, initializer_range)."""
    decoder = decoder_of(config, Decoder, layer=layer, norm=norm)
    model = CausalLM(decoder, tie_word_embeddings=config.tie_word_embeddings)
    init_weights(model, std=config.initializer_range)
    return model


@torch.no_grad()
def init_weights(model: nn.Module, *, std: float) -> None:
    """Fill every parameter: linear and embedding weights normal(0, std), biases 0; norms stay as built.

    Module order fixes the draw, so a seed fixes the weights. Does nothing on meta.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
            module.weight.normal_(0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def init_buffers(model: nn.Module, _config: object) -> None:
    """Fill the RoPE frequencies of a model that was built on meta and moved by `to_empty`."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.reset_buffers()
