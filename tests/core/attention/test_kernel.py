"""The driver hands a kernel exactly its slices, and puts parts together however they cover the rows."""

import pytest
import torch

from zoo.core.attention.kernel import RectangleBackend
from zoo.core.attention.mask import Mask
from zoo.core.contracts import AttentionSlice, SliceRule
from zoo.testing.attention import Example, reference

FULL, CAUSAL = SliceRule.FULL, SliceRule.CAUSAL


class Formula(RectangleBackend):
    """A third party's kernel, as short as can be; it also counts the scores it computes."""

    name = "formula"

    def __init__(self):
        self.area = self.calls = 0

    def supports(self, problem):
        return None

    def _scores(self, q, k, causal, scale):
        s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
        self.calls += 1
        self.area += q.shape[0] * (q.shape[2] * (q.shape[2] + 1) // 2 if causal else q.shape[2] * k.shape[2])
        return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf) if causal else s

    def rectangle_forward(self, q, k, v, *, causal, scale):
        s = self._scores(q, k, causal, scale)
        return s.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), s.logsumexp(-1)

    def rectangle_backward(self, dout, q, k, v, out, lse, *, causal, scale):
        r = q.shape[1] // k.shape[1]
        p = (self._scores(q, k, causal, scale) - lse[..., None]).exp()
        dp = dout @ v.repeat_interleave(r, 1).transpose(-1, -2)
        ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
        dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
        return ds @ k.repeat_interleave(r, 1), *(x.unflatten(1, (-1, r)).sum(2) for x in (dk, dv))


CAUSAL_ROW = {
    "one": [(0, 12, 0, 12, CAUSAL)],
    "split by rows": [(0, 5, 0, 5, CAUSAL), (5, 12, 0, 5, FULL), (5, 12, 5, 12, CAUSAL)],
    "out of order": [(5, 12, 5, 12, CAUSAL), (0, 5, 0, 5, CAUSAL), (5, 12, 0, 5, FULL)],
    "overlapping rows": [
        (4, 12, 0, 4, FULL),
        (0, 4, 0, 4, CAUSAL),
        (8, 12, 4, 8, FULL),
        (4, 8, 4, 8, CAUSAL),
        (8, 12, 8, 12, CAUSAL),
    ],
}


@pytest.mark.parametrize("slices", CAUSAL_ROW.values(), ids=CAUSAL_ROW.keys())
def test_any_cover_of_the_row_gives_the_same(slices):
    x, mask, backend = Example.random((2, 4, 2, 8), 12, dtype=torch.float64, device="cpu"), Mask.whole(12), Formula()
    slices = [AttentionSlice(*s) for s in slices]
    out, lse = backend.forward(x.q, x.k, x.v, slices, x.scale)
    grads = backend.backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)
    for got, wanted in zip((out, *grads), reference(x, mask)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert backend.area == 2 * 2 * mask.area  # forward and backward of two rows


def test_no_slices_is_no_attention():
    x = Example.random((1, 2, 1, 8), 5, dtype=torch.float32, device="cpu")
    out, lse = Formula().forward(x.q, x.k, x.v, (), x.scale)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((g == 0).all() for g in Formula().backward(x.dout, x.q, x.k, x.v, out, lse, (), x.scale))


def test_parts_of_half_precision_add_up_in_float32():
    class Half(Formula):
        def rectangle_backward(self, dout, q, k, v, *rest, **options):
            return torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)

    x = Example.random((1, 1, 1, 8), 600, dtype=torch.bfloat16, device="cpu")
    slices = [AttentionSlice(i, i + 1, 0, 1, FULL) for i in range(600)]
    lse = torch.zeros(1, 1, 600)
    _, dk, _ = Half().backward(x.dout, x.q, x.k, x.v, x.q, lse, slices, 1.0)
    assert dk.dtype == torch.float32
    assert dk[0, 0, 0, 0] == 600  # bfloat16 would stop at 256
