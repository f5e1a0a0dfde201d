"""Attention in float64 whatever the input: slow, and as exact as this machine gets.

B rows, T query tokens, S key tokens, N query heads, G key/value heads, R = N // G, H head size.
"""

import torch
from torch import Tensor

from zoo import AttentionProblem, RectangleBackend


class Fp64(RectangleBackend):
    """One rectangle of scores at a time; zoo cuts rows into rectangles and merges the results."""

    name = "fp64"

    def supports(self, problem: AttentionProblem) -> str | None:
        return None if problem.device in ("cpu", "cuda") else f"{problem.device} has no float64"

    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ _shared(v)
        return out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)

    def rectangle_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, dout, out = (_grouped(x, k) for x in (q, dout, out))
        weights = (_scores(q, k, causal, scale) - _grouped(lse.unsqueeze(-1), k)).exp()
        dweights = dout @ _shared(v).mT - (dout * out).sum(-1, keepdim=True)
        dscores = weights * dweights * scale
        dq = dscores @ _shared(k)
        return dq.flatten(1, 2), (dscores.mT @ queries).sum(2), (weights.mT @ dout).sum(2)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """`[B, N, T, H]` as `[B, G, R, T, H]`: the R heads that read one key/value head."""
    return torch.unflatten(x.double(), 1, (k.shape[1], -1))


def _shared(x: Tensor) -> Tensor:
    """`[B, G, S, H]` as `[B, G, 1, S, H]`."""
    return x.double().unsqueeze(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = _grouped(q, k) @ _shared(k).mT * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, -torch.inf)
    return scores
