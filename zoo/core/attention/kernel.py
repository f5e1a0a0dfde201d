"""The driver of attention backends: a kernel for one rectangle of scores becomes a backend over any slices.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.contracts import AttentionProblem, AttentionSlice, SliceRule


class RectangleBackend(ABC):
    """An attention backend by two functions on one rectangle; slices, merging and accumulation come for free.

    Tensors have any strides but the last, which is 1. Grouped heads are not repeated: query head n reads head
    n // (N // G). If `causal`, queries and keys have the same length and row i sees keys 0 to i. Neither side is empty.
    """

    name: str

    @abstractmethod
    def supports(self, problem: AttentionProblem) -> str | None:
        """None if it can compute the problem, otherwise the reason why not."""

    @abstractmethod
    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q `[B, N, T, H]`, k and v `[B, G, S, H]` to out `[B, N, T, H]` and lse `[B, N, T]` in fp32 or better."""

    @abstractmethod
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
        """dq, dk, dv of this rectangle; out and lse are those of the whole row, over all its keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[AttentionSlice], scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionBackend.forward`; out is what the kernel returns if one slice covers everything."""
        if _is_whole(slices, q, k):
            return self.rectangle_forward(q, k, v, causal=slices[0].rule is SliceRule.CAUSAL, scale=scale)
        out, lse = _empty_result(q)
        covered = 0
        for s in slices:
            part = self.rectangle_forward(
                _queries(q, s), _keys(k, s), _keys(v, s), causal=s.rule is SliceRule.CAUSAL, scale=scale
            )
            rows = _queries(out, s), _queries(lse, s)
            if s.q_start >= covered:
                rows[0].copy_(part[0])
                rows[1].copy_(part[1])
            else:
                merge_(*rows, *part)
            covered = max(covered, s.q_stop)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        slices: Sequence[AttentionSlice],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `AttentionBackend.backward`; gradients are what the kernel returns if one slice covers everything."""
        if _is_whole(slices, q, k):
            causal = slices[0].rule is SliceRule.CAUSAL
            return self.rectangle_backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
        dq, dk, dv = (_zeros(x) for x in (q, k, v))
        for s in slices:
            parts = self.rectangle_backward(
                _queries(dout, s),
                _queries(q, s),
                _keys(k, s),
                _keys(v, s),
                _queries(out, s),
                _queries(lse, s),
                causal=s.rule is SliceRule.CAUSAL,
                scale=scale,
            )
            for total, part in zip((_queries(dq, s), _keys(dk, s), _keys(dv, s)), parts, strict=True):
                total.add_(part)
        return dq, dk, dv


def _queries(x: Tensor, s: AttentionSlice) -> Tensor:
    return x.narrow(2, s.q_start, s.q_stop - s.q_start)


def _keys(x: Tensor, s: AttentionSlice) -> Tensor:
    return x.narrow(2, s.k_start, s.k_stop - s.k_start)


def _is_whole(slices: Sequence[AttentionSlice], q: Tensor, k: Tensor) -> bool:
    if len(slices) != 1:
        return False
    s = slices[0]
    return (s.q_start, s.q_stop, s.k_start, s.k_stop) == (0, q.shape[2], 0, k.shape[2])


def _zeros(x: Tensor) -> Tensor:
    """Zeros of `[B, heads, tokens, H]` laid out by tokens, as projections want them, in the accumulation dtype."""
    batch, heads, tokens, size = x.shape
    shape, dtype = (batch, tokens, heads, size), accumulation_dtype(x.dtype)
    return torch.zeros(shape, dtype=dtype, device=x.device).transpose(1, 2)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of rows that see no key."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    return _zeros(q), lse
