"""The shared decoder with a mixture of experts in every block: what the routers did comes out beside the tokens.

B rows, T tokens, D model width, H head size, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo import PADDING, Losses, RouterStats
from zoo.models.common.decoder import CausalLM, Decoder
from zoo.models.common.moe import LayerSum, RowPart, RowSum, SparseMoE, balance_loss


class SparseDecoderLayer(nn.Module):
    """h + attention(norm(h)), then h + experts(norm(h)). It has no `mlp` seam: a token's experts are not all here."""

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        block_sparse_moe: SparseMoE,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.block_sparse_moe = block_sparse_moe
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Any, padding: Tensor) -> tuple[Tensor, RouterStats]:
        """h `[B, T, D]`, cos and sin `[B, T, H/2]`, padding `[B, T]` to `[B, T, D]` and what the router did."""
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        out, stats = self.block_sparse_moe(self.post_attention_layernorm(h), padding)
        return h + out, stats


class SparseDecoder(Decoder):
    """A `Decoder` of `SparseDecoderLayer`s."""

    def __init__(self, **parts: Any) -> None:
        """As a `Decoder`."""
        super().__init__(**parts)
        self.row_part = RowPart()

    def forward(  # type: ignore[override]
        self, tokens: Tensor, positions: Tensor | None, mask: Any
    ) -> tuple[Tensor, list[RouterStats]]:
        """tokens and positions `[B, T]` to `[B, T, D]` and each layer's statistics."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h, stats = self.embed_tokens(tokens), []
        cos, sin = self.rotary_emb(positions, h.dtype)
        padding = self.row_part((positions == PADDING).expand(len(h), -1))
        for layer in self.layers.values():
            h, routed = self.run_block(layer, h, cos, sin, mask, padding)
            stats.append(routed)
        return self.norm(h), stats


class SparseCausalLM(CausalLM):
    """A sparse decoder with its head; with labels it returns `Losses`."""

    def __init__(
        self,
        model: SparseDecoder,
        *,
        tie_word_embeddings: bool,
        num_experts_per_tok: int,
        balance_coefficient: float | None,
    ) -> None:
        """`balance_coefficient` times the load-balancing loss is trained on; None: there is no such loss."""
        super().__init__(model, tie_word_embeddings=tie_word_embeddings)
        self.num_experts_per_tok = num_experts_per_tok
        self.balance_coefficient = balance_coefficient
        self.layer_sum = LayerSum()
        self.row_sum = RowSum()

    def forward(  # type: ignore[override]
        self, tokens: Tensor, positions: Tensor | None = None, mask: Any = None, labels: Tensor | None = None
    ) -> Tensor | Losses:
        """tokens, positions, labels `[B, T]` to logits `[B, T, V]`, or with labels to this rank's part of a row's loss.

        Reported are `expert_load` `[E]`, the share of assignments each expert got, all layers together, and
        `aux_loss`, the load-balancing loss before its coefficient, where it is trained on. Padding counts in neither.
        """
        h, stats = self.model(tokens, positions, mask)
        if labels is None:
            logits: Tensor = self.lm_head(h)
            return logits
        return self._losses(self.loss(h, self.lm_head.weight, labels), stats)

    def _losses(self, tokens: Tensor, stats: list[RouterStats]) -> Losses:
        here = self.layer_sum(stats)
        row = self.row_sum(here.assignments)
        load = {"expert_load": here.assignments.double() / row.sum().clamp(min=1)}
        if self.balance_coefficient is None:
            return Losses(tokens, token_report=load)
        aux = balance_loss([here], self.num_experts_per_tok, row)
        return Losses(tokens, self.balance_coefficient * aux, {"aux_loss": aux.detach()}, load)
