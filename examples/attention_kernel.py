"""An attention backend of one file: two functions on a rectangle of scores, here in plain torch.

    zoo --plugin examples/attention_kernel.py finetune llama3 --attn plain --cp 2

zoo cuts packed rows and windows into rectangles, moves keys and values between ranks and merges what comes back, so
this works with every mask and every context scheme.

B rows, T query tokens, S key tokens, N query heads, G key/value heads, R = N // G, H head size.
"""

import torch
from torch import Tensor

from zoo import AttentionEntry, AttentionProblem, RectangleBackend, hookimpl


@hookimpl
def zoo_register_attention() -> list[AttentionEntry]:
    return [AttentionEntry(name="plain", target=f"{__name__}:Plain", help="the formula, all scores at a time")]


class Plain(RectangleBackend):
    name = "plain"

    def supports(self, problem: AttentionProblem) -> str | None:
        return None if problem.dtype.startswith("float") else f"plain computes floats, not {problem.dtype}"

    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, causal, scale)
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)

    def rectangle_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, dout, out, lse = (_grouped(x, k) for x in (q, dout, out, lse))
        # lse is over all keys of the row, on whatever rank they are: so these weights are the final ones.
        weights = (_scores(q.flatten(1, 2), k, causal, scale) - lse[..., None]).exp()
        dweights = dout @ v[:, :, None].mT
        dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * scale
        return (dscores @ k[:, :, None]).flatten(1, 2), (dscores.mT @ q).sum(2), (weights.mT @ dout).sum(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """`[B, G, R, T, S]`, -inf where a query does not see a key."""
    scores = _grouped(q, k) @ k[:, :, None].mT * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf) if causal else scores


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """`[B, N, ...]` as `[B, G, R, ...]`: the R query heads that read one key/value head."""
    return torch.unflatten(x, 1, (k.shape[1], -1))
