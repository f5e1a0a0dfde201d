"""torch's CUDA attention operators, by their own conventions for lse, grouped heads and arguments.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import AttentionProblem, RectangleBackend

_aten = torch.ops.aten
_HALF = ("bfloat16", "float16")
_LSE_ALIGNMENT = 32
"""The memory-efficient backward reads lse in blocks of this many rows."""


class Kernel(Protocol):
    """One operator pair; arguments as in `RectangleBackend`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def unsupported(problem: AttentionProblem) -> str | None:
    """Why no operator of this file computes a problem on CUDA, or None."""
    if problem.dtype not in (*_HALF, "float32"):
        return f"torch's CUDA kernels do not compute {problem.dtype}; use --attn dense or --dtype bfloat16"
    step = 8 if problem.dtype in _HALF else 4
    if problem.head_dim % step:
        return f"torch's CUDA kernels need a head size that is a multiple of {step}, not {problem.head_dim}"
    if problem.dtype in _HALF and problem.head_dim > 256:
        return f"torch's flash kernel has head sizes up to 256, not {problem.head_dim}"
    return None


def kernel(dtype: torch.dtype) -> Kernel:
    """Flash for half precision, memory-efficient for float32."""
    return Efficient() if dtype == torch.float32 else Flash()


class Flash:
    """FlashAttention-2 as torch ships it. Takes grouped heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        result = _aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = _no_dropout(q)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward.default(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class Efficient:
    """The memory-efficient kernel (CUTLASS). Takes equal heads only and lse in whole blocks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        result = _aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, causal, scale=scale)
        return result[0], result[1][:, :, : q.shape[2]]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = _no_dropout(q)
        groups, heads = k.shape[1], q.shape[1]
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward.default(
            dout, q, expand_heads(k, heads), expand_heads(v, heads), None, out, pad_lse(lse), seed, offset, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return dq, sum_heads(dk, groups), sum_heads(dv, groups)


class Cudnn(RectangleBackend):
    """cuDNN's kernel. Takes grouped heads; its lse has one more dim at the end."""

    name = "cudnn"

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.device != "cuda":
            return f"cuDNN runs on CUDA only, not on '{problem.device}'"
        if problem.dtype not in _HALF:
            return f"cuDNN computes bfloat16 and float16, not {problem.dtype}"
        if problem.head_dim % 8 or problem.head_dim > 128:
            return f"cuDNN needs a head size that is a multiple of 8 up to 128, not {problem.head_dim}"
        # torch itself leaves it out under `use_deterministic_algorithms`.
        return (
            "cuDNN's backward adds in no fixed order, and --deterministic asks for one"
            if problem.deterministic
            else None
        )

    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = _aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, causal, scale=scale)
        return result[0], result[1].reshape(q.shape[:3])

    def rectangle_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = _no_dropout(q)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward.default(
            dout.to(q.dtype), q, k, v, out.to(q.dtype), lse.contiguous().unsqueeze(-1), seed, offset, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, G, S, H]` to `[B, N, S, H]`, each head as often as query heads share it, for kernels without groups."""
    repeats = heads // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def sum_heads(x: Tensor, groups: int) -> Tensor:
    """The derivative of `expand_heads`: `[B, N, S, H]` to `[B, G, S, H]`, in fp32."""
    return x if x.shape[1] == groups else torch.unflatten(x, 1, (groups, -1)).sum(2, dtype=torch.float32)


def pad_lse(lse: Tensor) -> Tensor:
    """lse `[B, N, T]` with T rounded up to whole blocks; +inf makes the weights of the added rows zero."""
    return F.pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=torch.inf).contiguous()


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """Random state that the operators ask for and, without dropout, never read."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros((), dtype=torch.uint64, device=q.device)
