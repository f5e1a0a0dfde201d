"""Grouped-query attention with the hub's projections around a replaceable core.

B rows, T tokens, D model width, N query heads, G key/value heads, H head size, R rotated size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo import UsageError
from zoo.models.common.rope import rotate

_ROWS = 512
"""Query rows that are computed together under a window, at least."""


class AttentionCore(nn.Module):
    """The attention seam, as a single device without packing runs it: causal over the whole row.

    What replaces it takes the same arguments. Documents and remote keys belong to whoever replaces it, together with
    the meaning of `mask`.
    """

    def __init__(self, window: int | None = None) -> None:
        """`window` is the sliding window in tokens, the token itself included; whoever replaces the core keeps it."""
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None) -> Tensor:
        """Attend with q `[B, N, T, H]`, k and v `[B, G, T, H]`; return `[B, N, T, H]`.

        `scale` multiplies the scores q @ k^T before the softmax; None is `H ** -0.5`. Raises UsageError if there is a
        mask.
        """
        if mask is not None:
            raise UsageError(
                "this model's attention is plain causal and cannot read a packed mask: call it with mask=None, "
                "or replace the plan's attention seam first, as `zoo finetune` does"
            )
        if self.window is None or self.window >= q.shape[2]:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return _windowed(q, k, v, self.window, scale)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Some query rows at a time with the keys they reach, so that no mask of the whole row exists."""
    parts, rows = [], max(window, _ROWS)
    for start in range(0, q.shape[2], rows):
        stop, first = min(start + rows, q.shape[2]), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        parts.append(
            functional.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, 2)


class Attention(nn.Module):
    """q, k, v and o projections, RoPE, and the core. Heads are counted from what the projections return."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.core = AttentionCore(window)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        """h `[B, T, D]`, cos and sin `[B, T, R/2]` to `[B, T, D]`."""
        q = rotate(self._heads(self.q_proj(h)), cos, sin)
        k = rotate(self._heads(self.k_proj(h)), cos, sin)
        out = self.core(q, k, self._heads(self.v_proj(h)), mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
