"""The `dense` backend: attention as its formula, in the accumulation dtype, a block of query rows at a time.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, R = N // G query heads that
share one, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo import AttentionProblem, RectangleBackend
from zoo.core.attention.merge import accumulation_dtype

MAX_SCORES = 1 << 22
"""Scores that exist at a time (32 MB in fp64), so that memory does not grow with the square of the length."""


class Dense(RectangleBackend):
    """softmax(q k^T scale) v and its derivative, written out. What every other kernel is compared with."""

    name = "dense"

    def supports(self, problem: AttentionProblem) -> str | None:
        """Everything whose query heads divide evenly among key/value heads."""
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads cannot share {problem.num_kv_heads} key/value heads evenly"
        return None

    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        groups, dtype = k.shape[1], accumulation_dtype(q.dtype)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        for start, stop, keys in _blocks(q, k, causal=causal):
            scores = _scores(_grouped(q, start, stop, groups), k, start, keys, causal=causal, scale=scale)
            total = scores.logsumexp(-1, keepdim=True)
            mean = _times(scores.sub_(total).exp_(), v[:, :, :keys].to(dtype))
            out[:, :, start:stop] = mean.flatten(1, 2)
            lse[:, :, start:stop] = total.flatten(1, 2).squeeze(-1)
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
        groups, dtype = k.shape[1], accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for start, stop, keys in _blocks(q, k, causal=causal):
            queries, upstream, result = (_grouped(x, start, stop, groups) for x in (q, dout, out))
            total = _grouped(lse.unsqueeze(-1), start, stop, groups)
            weights = _scores(queries, k, start, keys, causal=causal, scale=scale).sub_(total).exp_()
            dv[:, :, :keys] += _sum_over_queries(weights, upstream)
            dweights = _times(upstream, v[:, :, :keys].to(dtype).transpose(-1, -2))
            dscores = weights.mul_(dweights.sub_((upstream * result).sum(-1, keepdim=True))).mul_(scale)
            dq[:, :, start:stop] = _times(dscores, k[:, :, :keys].to(dtype)).flatten(1, 2)
            dk[:, :, :keys] += _sum_over_queries(dscores, queries)
        return dq, dk, dv


def _blocks(q: Tensor, k: Tensor, *, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Blocks of query rows, each with how many keys its last row sees."""
    tokens, keys = q.shape[2], k.shape[2]
    step = max(1, MAX_SCORES // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        yield start, stop, stop if causal else keys


def _grouped(x: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """Rows of `[B, N, T, H]` as `[B, G, R, t, H]` in the accumulation dtype."""
    return torch.unflatten(x[:, :, start:stop], 1, (groups, -1)).to(accumulation_dtype(x.dtype))


def _scores(queries: Tensor, k: Tensor, start: int, keys: int, *, causal: bool, scale: float) -> Tensor:
    """`[B, G, R, t, S]`, -inf where a row does not see a key."""
    scores = _times(queries, k[:, :, :keys].to(queries.dtype).transpose(-1, -2)).mul_(scale)
    if causal:
        rows = torch.arange(start, start + queries.shape[3], device=k.device)
        scores.masked_fill_(torch.arange(keys, device=k.device) > rows[:, None], -torch.inf)
    return scores


def _times(grouped: Tensor, shared: Tensor) -> Tensor:
    """`[B, G, R, t, X]` by `[B, G, X, Y]`: the R heads are rows of one product, so nothing is repeated for them."""
    return torch.unflatten(grouped.flatten(2, 3) @ shared, 2, grouped.shape[2:4])


def _sum_over_queries(grouped: Tensor, other: Tensor) -> Tensor:
    """`[B, G, R, t, X]` and `[B, G, R, t, Y]` to `[B, G, X, Y]`, summed over all query rows of all R heads."""
    return grouped.flatten(2, 3).transpose(-1, -2) @ other.flatten(2, 3)
