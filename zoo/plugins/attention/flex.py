"""The `flex` backend: torch's FlexAttention with block masks, for head sizes and dtypes that others refuse.

In a launch every query row sees one interval of keys, so a mask is two numbers a row. The operators are called
directly, because the public function gives no backward pass from an out and a lse over more keys than are here; they
take and return lse to the base 2.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
from torch.nn.attention.flex_attention import BlockMask

from zoo import AttentionProblem
from zoo.plugins.attention.banded import BandedBackend
from zoo.plugins.attention.bands import Band, Launch
from zoo.plugins.attention.flex_blocks import Intervals, Piece, block_mask, one_block

MAX_SCORES = 1 << 22
"""Scores that exist at a time on a CPU, where torch computes them all before it masks them."""
_MAX_COMPILATIONS = 64
_LN2 = math.log(2.0)


class Flex(BandedBackend):
    """FlexAttention: compiled to Triton on CUDA; on a CPU torch's own plain code, some rows at a time."""

    name = "flex"

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads cannot share {problem.num_kv_heads} key/value heads evenly"
        if problem.device == "cpu":
            return None
        if problem.device == "cuda":
            return _cuda_reason(problem)
        return f"FlexAttention runs here on CPU and CUDA, not on '{problem.device}'; use --attn dense"

    @staticmethod
    def may_follow(last: Band, band: Band) -> bool:
        """No query row twice; keys as they come."""
        return last.q_stop <= band.q_start

    def launch_forward(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        if q.is_cuda:
            mask = block_mask(launch, q.shape[2], k.shape[2], q.device)
            out, lse = _compiled(_forward, q, k, v, mask, scale)
            return out, lse * _LN2
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=_lse_dtype(q), device=q.device)
        for part in _pieces(q, launch):
            rows, keys = part.queries, part.keys
            part_out, part_lse = _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], one_block(part), scale)
            out[:, :, rows] = part_out
            lse[:, :, rows] = part_lse * _LN2
        return out, lse

    def launch_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = lse / _LN2
        if q.is_cuda:
            mask = block_mask(launch, q.shape[2], k.shape[2], q.device)
            dq, dk, dv = _compiled(_backward, q, k, v, out, lse, dout, mask, scale, None)
            return dq, dk, dv
        dq, dk, dv = (torch.zeros_like(x, dtype=_lse_dtype(x)) for x in (q, k, v))
        for part in _pieces(q, launch):
            rows, keys = part.queries, part.keys
            grads = _backward(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows], dout[:, :, rows],
                one_block(part), scale, _derivative,
            )  # fmt: skip
            for total, piece, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
                total[:, :, piece] += grad
        return dq, dk, dv


def _cuda_reason(problem: AttentionProblem) -> str | None:
    if problem.dtype not in ("bfloat16", "float16", "float32"):
        return f"FlexAttention on CUDA does not compute {problem.dtype}; use --attn dense"
    if not 16 <= problem.head_dim <= 256:
        return f"FlexAttention on CUDA has head sizes from 16 to 256, not {problem.head_dim}; use --attn dense"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        return f"FlexAttention's backward pass compiles from torch 2.12 on, and this is {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention on CUDA needs Triton: pip install triton"
    return None


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = flex_attention(q, k, v, _score, mask.as_tuple(), scale, {})
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    mask: BlockMask,
    scale: float,
    derivative: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the row's out and lse over all its keys: the weights are those of the whole softmax."""
    dq, dk, dv, _ = flex_attention_backward(
        q, k, v, out, lse, dout, torch.zeros_like(lse), _score, derivative, mask.as_tuple(), scale, {}, (), ()
    )
    return dq, dk, dv


def _score(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
    return score


def _derivative(
    _score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """The derivative of `_score`. The compiler finds it by itself, torch before 2.12 does not."""
    return [grad, None, None, None, None]


def _compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Sizes change from step to step: the second one compiles for any, later ones for what that left fixed."""
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MAX_COMPILATIONS):
        return _compile(function)(*args)


@lru_cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not whole, it would fall back to code that holds every score.
    return torch.compile(function, fullgraph=True)


def _pieces(q: Tensor, launch: Launch) -> tuple[Piece, ...]:
    return Intervals.of(launch, q.shape[2]).pieces(MAX_SCORES // (q.shape[0] * q.shape[1]))


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
