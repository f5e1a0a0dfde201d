"""The `sdpa` backend: torch's fused kernels by the operators that return lse, without autograd around them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import AttentionProblem, RectangleBackend
from zoo.core.attention.merge import accumulation_dtype
from zoo.plugins.attention import sdpa_cuda

_aten = torch.ops.aten


class Sdpa(RectangleBackend):
    """torch's own kernel for the device: CPU flash, CUDA flash (half precision) or memory-efficient (float32)."""

    name = "sdpa"

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads cannot share {problem.num_kv_heads} key/value heads evenly"
        if problem.device == "cpu":
            return None
        if problem.device == "cuda":
            return sdpa_cuda.unsupported(problem)
        return f"torch has no kernel that returns lse on '{problem.device}'; use --attn dense"

    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        if q.is_cuda:
            return sdpa_cuda.kernel(q.dtype).forward(q, k, v, causal=causal, scale=scale)
        q, k, v = (_widen(x) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
        return out, lse

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
        if q.is_cuda:
            kernel = sdpa_cuda.kernel(q.dtype)
            return kernel.backward(dout.to(q.dtype), q, k, v, out.to(q.dtype), lse, causal=causal, scale=scale)
        dout, q, k, v, out = (_widen(x) for x in (dout, q, k, v, out))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv


def _widen(x: Tensor) -> Tensor:
    """The CPU kernel's backward takes 7 times as long in bfloat16 as in float32, and rounds every partial sum."""
    return x.to(accumulation_dtype(x.dtype))
