"""A kernel as short as can be, which counts the scores it computes."""

import torch

from zoo.core.attention.kernel import RectangleBackend


class Formula(RectangleBackend):
    """Attention written out, in whatever type it gets. `scores` counts visible pairs times heads times batch rows."""

    name = "formula"

    def __init__(self):
        self.scores = 0

    def supports(self, problem):
        return None

    def _scores(self, q, k, causal, scale):
        rows, keys = q.shape[2], k.shape[2]
        self.scores += q.shape[0] * q.shape[1] * (rows * (rows + 1) // 2 if causal else rows * keys)
        s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
        return s.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(1), -torch.inf) if causal else s

    def rectangle_forward(self, q, k, v, *, causal, scale):
        s = self._scores(q, k, causal, scale)
        lse = s.logsumexp(-1)
        wide = torch.promote_types(lse.dtype, torch.float32)  # as the contract has it, whatever was computed in
        return s.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse.to(wide)

    def rectangle_backward(self, dout, q, k, v, out, lse, *, causal, scale):
        r = q.shape[1] // k.shape[1]
        p = (self._scores(q, k, causal, scale) - lse[..., None].to(q.dtype)).exp()
        dp = dout @ v.repeat_interleave(r, 1).transpose(-1, -2)
        ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
        dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
        return ds @ k.repeat_interleave(r, 1), *(x.unflatten(1, (-1, r)).sum(2) for x in (dk, dv))
