"""Rotary position embedding: the hub's inverse frequencies and its half-split rotation (Su et al., 2104.09864).

B rows, T tokens, N heads, H head size, R rotated size: the first R numbers of a head turn, the rest pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.models.common.rope_parameters import RopeParameters


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, computed once a forward and shared by all layers.

    Frequencies stay fp32 whatever the module is cast to: rounding them to bf16 ruins long positions.
    `dynamic` keeps no state: its base follows the longest position of the call, never below
    `max_position_embeddings`, so the same call always gives the same answer.
    """

    inv_freq: Tensor

    def __init__(self, parameters: RopeParameters, *, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.rope = parameters
        self.rotated = parameters.rotated(head_dim)
        self.max_position_embeddings = max_position_embeddings
        self.attention_factor = attention_factor(parameters)
        self.register_buffer("inv_freq", torch.empty(self.rotated // 2, dtype=torch.float32), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recompute the frequencies on the device where the buffer is; on meta there is nothing to compute."""
        if not self.inv_freq.is_meta:
            exact = inverse_frequencies(self.rope, self.rotated, self.max_position_embeddings)
            self.inv_freq = exact.to(self.inv_freq.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = self.inv_freq.float()
        self.reset_buffers()
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions `[B, T]` to cos and sin `[B, T, R/2]`, computed in fp32 or better and cast to `dtype`."""
        exact = torch.promote_types(dtype, torch.float32)
        angles = positions[..., None].to(exact) * self._frequencies(positions).to(exact)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _frequencies(self, positions: Tensor) -> Tensor:
        if self.rope.rope_type != "dynamic":
            return self.inv_freq
        length = positions.max() + 1
        grown = _dynamic(self.rope, self.rotated, self.max_position_embeddings, length)
        return torch.where(length > self.max_position_embeddings, grown, self.inv_freq)


class _Rotate(torch.autograd.Function):
    """Rotation of pairs (d, d + R/2). Backward is the rotation by minus the angle, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dout, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1]
    (x1, x2, rest), (out1, out2, passed) = (t.tensor_split((half, 2 * half), -1) for t in (x, out))
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=sign)
    passed.copy_(rest)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, N, T, H]` by cos and sin `[B, T, R/2]`."""
    rotated: Tensor = _Rotate.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))  # type: ignore[no-untyped-call]
    return rotated


# Frequencies: the order of operations is transformers', so that the bits are too ------------------------


def inverse_frequencies(rope: RopeParameters, rotated: int, max_position_embeddings: int) -> Tensor:
    """fp32 `[R/2]` on the CPU, bit for bit what transformers 5 computes when a model is built."""
    if rope.rope_type == "dynamic":
        return _dynamic(rope, rotated, max_position_embeddings, max_position_embeddings)
    if rope.rope_type == "yarn":
        return _yarn(rope, rotated)
    inv_freq = 1.0 / rope.rope_theta ** _exponents(rotated)
    if rope.rope_type == "linear":
        return inv_freq / _set(rope.factor)
    return _llama3(rope, inv_freq) if rope.rope_type == "llama3" else inv_freq


def attention_factor(rope: RopeParameters) -> float:
    """What cos and sin are multiplied by: 1 except for yarn (Peng et al., 2309.00071, section 3.4)."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _set(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(factor, rope.mscale) / _magnitude(factor, rope.mscale_all_dim)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _exponents(rotated: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated


def _dynamic(rope: RopeParameters, rotated: int, max_length: int, length: int | Tensor) -> Tensor:
    """NTK-aware scaling: the base grows with the length, so that the slowest pair just spans it."""
    factor = _set(rope.factor)
    growth = (factor * length / max_length - (factor - 1)) ** (rotated / (rotated - 2))
    device = length.device if isinstance(length, Tensor) else "cpu"
    return torch.as_tensor(1.0 / (rope.rope_theta * growth) ** _exponents(rotated, device))


def _llama3(rope: RopeParameters, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    factor, low, high = _set(rope.factor), _set(rope.low_freq_factor), _set(rope.high_freq_factor)
    length = _set(rope.original_max_position_embeddings)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
    smooth = (length / wavelength - low) / (high - low)
    between = ~(wavelength < length / high) * ~(wavelength > length / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(rope: RopeParameters, rotated: int) -> Tensor:
    """Peng et al., 2309.00071, section 3.2: interpolate slow pairs, keep fast ones, ramp between."""
    periods = rope.rope_theta ** _exponents(rotated)
    kept, divided = 1.0 / periods, 1.0 / (_set(rope.factor) * periods)
    low, high = _ramp_bounds(rope, rotated)
    ramp = torch.clamp((torch.arange(rotated // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return divided * (1 - keep) + kept * keep


def _ramp_bounds(rope: RopeParameters, rotated: int) -> tuple[float, float]:
    length = _set(rope.original_max_position_embeddings)

    def pair(rotations: float) -> float:
        return rotated * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32), pair(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    return low, high + 0.001 if low == high else high


def _set(value: float | None) -> float:
    """A field that `parse_rope` requires for this type."""
    if value is None:
        raise ValueError("RopeParameters lack a field that their rope_type needs")
    return value
