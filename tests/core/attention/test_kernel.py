"""The driver hands a kernel exactly its slices, and puts parts together however they cover the rows."""

import itertools

import pytest
import torch

from zoo.core.attention import kernel
from zoo.core.attention.kernel import RectangleBackend
from zoo.core.contracts.attention import AttentionSlice, SliceRule
from zoo.core.sequence.mask import Mask
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


@pytest.mark.parametrize("order", range(6))
def test_slices_may_come_in_any_order_and_cover_a_row_in_part(order):
    """A later slice may start where nothing was before and end where something was."""
    x, backend = Example.random((1, 2, 1, 8), 12, dtype=torch.float64, device="cpu"), Formula()
    slices = [
        AttentionSlice(6, 12, 6, 12, CAUSAL),
        AttentionSlice(2, 9, 0, 2, FULL),
        AttentionSlice(0, 2, 0, 2, CAUSAL),
    ]
    slices = list(itertools.permutations(slices))[order]
    visible = torch.zeros(12, 12, dtype=torch.bool)
    for s in slices:
        part = visible[s.q_start : s.q_stop, s.k_start : s.k_stop]
        part |= torch.ones_like(part).tril() if s.rule is CAUSAL else torch.ones_like(part)
    out, lse = backend.forward(x.q, x.k, x.v, slices, x.scale)
    scores = (x.q @ x.k.mT * x.scale).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(out, scores.softmax(-1) @ x.v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_small_slices_of_one_shape_are_one_call(batch):
    """Documents share no row; the blocks of a window share keys, whose gradients add up."""
    x, backend = Example.random((batch, 4, 2, 8), 96, dtype=torch.float64, device="cpu"), Formula()
    documents = Mask(96, tuple((at, at + 4) for at in range(0, 96, 4)))
    slices = [AttentionSlice(*piece, *piece, CAUSAL) for piece in documents.documents]
    for got, wanted in zip(_both(backend, x, slices), reference(x, documents)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert backend.calls == 2
    backend = Formula()
    slices = [AttentionSlice(at, at + 4, 0, 32, FULL) for at in range(0, 96, 4)]
    whole = [AttentionSlice(0, 96, 0, 32, FULL)]
    for got, wanted in zip(_both(backend, x, slices), _both(Formula(), x, whole)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert backend.calls == 2


def _both(backend, x, slices):
    out, lse = backend.forward(x.q, x.k, x.v, slices, x.scale)
    return out, *backend.backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)


def test_large_slices_are_views_and_not_copies(monkeypatch):
    seen = []

    class Spy(Formula):
        def rectangle_forward(self, q, k, v, **options):
            seen.extend((q, k, v))
            return super().rectangle_forward(q, k, v, **options)

    monkeypatch.setattr(kernel, "MAX_STACKED_AREA", 15)
    kernel._stacks.cache_clear()
    x = Example.random((1, 2, 1, 8), 12, dtype=torch.float64, device="cpu")
    Spy().forward(x.q, x.k, x.v, [AttentionSlice(i, i + 4, i, i + 4, CAUSAL) for i in (0, 4, 8)], x.scale)
    kernel._stacks.cache_clear()
    wanted = [t[:, :, i:].data_ptr() for i in (0, 4, 8) for t in (x.q, x.k, x.v)]
    assert [t.data_ptr() for t in seen] == wanted


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
