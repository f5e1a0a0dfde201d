"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 1910.07467) with the hub's rounding.

    Statistics in fp32 or better, the normalised value rounded to the input's dtype *before* it is multiplied
    by the weight.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.weight * functional.rms_norm(h, (h.shape[-1],), None, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LayerNorm1P(nn.Module):
    """Layer norm whose stored weight is the scale less 1, so that weight decay pulls towards 1 (NeMo's layernorm1p).

    The sum `weight + 1` is rounded to the weight's own dtype, as the hub's models were trained.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return functional.layer_norm(h, (h.shape[-1],), self.weight + 1.0, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
