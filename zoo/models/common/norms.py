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
