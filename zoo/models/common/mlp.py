"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SwiGLU(nn.Module):
    """down(silu(gate(h)) * up(h)), Shazeer, 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`; each row alone, so any cut of the rows gives the same result."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return out


class SquaredReLU(nn.Module):
    """down(relu(up(h)) ** 2), So et al., 2109.08668; no gate."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`; each row alone, so any cut of the rows gives the same result."""
        out: Tensor = self.down_proj(functional.relu(self.up_proj(h)).square())
        return out


class RunMLP(nn.Module):
    """The seam through which a block runs its feed-forward part. Has no parameters, holds no module."""

    def forward(self, mlp: nn.Module, h: Tensor) -> Tensor:
        out: Tensor = mlp(h)
        return out
