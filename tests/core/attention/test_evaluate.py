"""Slices of every rule through kernels that know full and causal ones equal the formula; sums stay in fp32."""

import pytest
import torch
from hypothesis import given, strategies as st

from tests.core.attention.draw import masks, patient
from tests.core.attention.formula import Formula
from zoo.core.attention.evaluate import attend, attend_backward
from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import AttentionProblem, AttentionSlice, SliceRule
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.mask import Mask
from zoo.testing.attention import Example, reference, reference_lse

FULL, CAUSAL, ANTICAUSAL = SliceRule
SHAPE = (2, 4, 2, 8)
REGISTRY = Registry(Plugins.load(only=[]))


def _able(dtype):
    """Names of the backends that compute the usual shape here; what refuses, and why, docs/context-schemes.md lists."""
    _, heads, groups, size = SHAPE
    problem = AttentionProblem(device="cpu", dtype=dtype, head_dim=size, num_heads=heads, num_kv_heads=groups)
    return [name for name in REGISTRY.attention.names() if _backend(name).supports(problem) is None]


def _backend(name):
    return Formula() if name == "formula" else REGISTRY.attention.load(name)()


def _example(rows, dtype=torch.float64):
    return Example.random(SHAPE, rows, dtype=dtype, device="cpu")


def _dense(x, slices):
    """out, lse, dq, dk, dv of slices by a matrix of what they show, in fp64."""
    rows = x.q.shape[2]
    shown = torch.zeros(rows, rows, dtype=torch.bool)
    for s in slices:
        part = torch.ones(s.q_stop - s.q_start, s.k_stop - s.k_start, dtype=torch.bool)
        part = part.tril() if s.rule is CAUSAL else part.triu() if s.rule is ANTICAUSAL else part
        assert not (shown[s.q_start : s.q_stop, s.k_start : s.k_stop] & part).any()
        shown[s.q_start : s.q_stop, s.k_start : s.k_stop] |= part
    q, k, v = (t.double().requires_grad_() for t in (x.q, x.k, x.v))
    repeats = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(repeats, 1).mT * x.scale).masked_fill(~shown, -1e300)
    out = (scores.softmax(-1) * shown) @ v.repeat_interleave(repeats, 1)
    lse = scores.masked_fill(~shown, -torch.inf).logsumexp(-1)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), x.dout.double())


def _both_ways(backend, x, slices):
    out, lse = attend(backend, x.q, x.k, x.v, slices, x.scale)
    out = out.to(x.q.dtype)
    return out, lse, *attend_backward(backend, x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)


CASES = {
    "one triangle": [(0, 9, 0, 9, ANTICAUSAL)],
    "a triangle off the diagonal": [(3, 8, 11, 16, ANTICAUSAL)],
    "several, with rows between and beside": [
        (1, 4, 9, 12, ANTICAUSAL),
        (6, 7, 2, 3, ANTICAUSAL),
        (8, 15, 4, 11, ANTICAUSAL),
    ],
    "one row twice": [(2, 8, 0, 6, ANTICAUSAL), (2, 8, 6, 12, ANTICAUSAL)],
    "all rules in one row": [(4, 9, 0, 5, ANTICAUSAL), (4, 9, 5, 7, FULL), (4, 9, 7, 12, CAUSAL), (0, 2, 0, 2, CAUSAL)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["formula", *_able("float64")])
def test_anti_causal_slices_through_any_kernel_equal_the_formula(name, case):
    x, slices = _example(16), tuple(AttentionSlice(*s) for s in CASES[case])
    for got, wanted in zip(_both_ways(_backend(name), x, slices), _dense(x, slices)):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-12)


@patient
@given(masks(max_length=50), st.sampled_from(["formula", "dense", "sdpa"]))
def test_any_mask_equals_the_formula(mask, name):
    x = _example(mask.length)
    out, lse, *grads = _both_ways(_backend(name), x, local_slices(mask, ((0, mask.length),)))
    for got, wanted in zip((out, *grads, lse), (*reference(x, mask), reference_lse(x, mask))):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_a_kernel_never_sees_an_anti_causal_slice():
    seen = []

    class Spy(Formula):
        def forward(self, q, k, v, slices, scale):
            seen.extend((s.rule, s.q_stop <= q.shape[2], s.k_stop <= k.shape[2]) for s in slices)
            return super().forward(q, k, v, slices, scale)

        def backward(self, dout, q, k, v, out, lse, slices, scale):
            seen.extend((s.rule, s.q_stop <= q.shape[2], s.k_stop <= k.shape[2]) for s in slices)
            return super().backward(dout, q, k, v, out, lse, slices, scale)

    mask, backend = Mask.whole(40, window=7), Spy()
    _both_ways(backend, _example(40), local_slices(mask, ((0, 40),)))
    assert set(seen) == {(FULL, True, True), (CAUSAL, True, True)}
    assert backend.scores == 2 * mask.area * SHAPE[0] * SHAPE[1]  # forward and backward, and no score for the flip


def test_slices_without_an_anti_causal_one_go_to_the_kernel_as_they_are():
    asked = []

    class Spy(Formula):
        def forward(self, q, k, v, slices, scale):
            asked.append(slices)
            return super().forward(q, k, v, slices, scale)

    # Equal slices that another test asked about first would come out of the cache in their place.
    slices = local_slices(Mask.whole(211), ((0, 211),))
    attend(Spy(), *(getattr(_example(211), name) for name in "qkv"), slices, 1.0)
    assert len(asked) == 1
    assert asked[0] is slices


@pytest.mark.parametrize("name", _able("bfloat16"))
def test_a_window_in_bfloat16_is_as_exact_as_no_window(name):
    """Both halves of a window merge in fp32, also where the kernel itself returns bfloat16.

    Then results are rounded to bfloat16 once, by at most 2^-8 of each; merged in bfloat16 they would be twice.
    """
    backend, errors = _backend(name), {}
    x = _example(128, torch.bfloat16)
    for window in (None, 16):
        mask = Mask.whole(128, window=window)
        out, lse, *grads = _both_ways(backend, x, local_slices(mask, ((0, 128),)))
        assert lse.dtype == torch.float32
        if window:
            assert {grad.dtype for grad in grads} == {torch.float32}
        errors[window] = [_error(got, wanted) for got, wanted in zip((out, *grads), reference(x, mask))]
    assert all(narrow < max(1.3 * wide, 4e-3) for narrow, wide in zip(errors[16], errors[None])), errors


def test_parts_that_a_kernel_rounds_are_still_summed_in_float32():
    class Half(Formula):
        """Rounds its gradients, as CUDA kernels do; each part is 1."""

        def rectangle_forward(self, *args, **how):
            out, lse = super().rectangle_forward(*args, **how)
            return out, lse.float()

        def forward(self, q, k, v, slices, scale):
            out, lse = super().forward(q, k, v, slices, scale)
            return out.bfloat16(), lse

        def backward(self, dout, q, k, v, out, lse, slices, scale):
            return tuple(torch.full_like(t, 0.00390625 if len(slices) > 1 else 1.0) for t in (q, k, v))

    x = _example(8, torch.bfloat16)
    two = (AttentionSlice(0, 4, 0, 4, CAUSAL), AttentionSlice(4, 8, 4, 8, CAUSAL))
    slices = (*two, AttentionSlice(4, 8, 0, 4, ANTICAUSAL))
    out, lse = attend(Half(), x.q, x.k, x.v, slices, 1.0)
    assert out.dtype == torch.float32
    dq, dk, dv = attend_backward(Half(), x.dout, x.q, x.k, x.v, out, lse, slices, 1.0)
    # 1 + 1/256 is no bfloat16: it would be 1.
    assert {dq[0, 0, 5, 0].item(), dk[0, 0, 1, 0].item(), dv[0, 0, 1, 0].item()} == {1.00390625}


def _error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()
