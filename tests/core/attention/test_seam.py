"""The seam: dtypes, strides, gradients, recompute, and refusals that name the mask."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.core.attention.formula import Formula
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.contracts.attention import Stage
from zoo.core.errors import UsageError
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.testing.attention import Example, reference

SHARDED = ShardedMask(Mask.whole(80), SequenceLayout.head_tail(80, 2), 0)
MASK = Mask(40, ((0, 9), (9, 30), (33, 40)))


def _example(dtype=torch.float64):
    x = Example.random((2, 4, 2, 8), 40, dtype=dtype, device="cpu")
    for t in (x.q, x.k, x.v):
        t.requires_grad_()
    return x


def _run(x, attention):
    out = attention(x.q, x.k, x.v)
    return out, *torch.autograd.grad(out, (x.q, x.k, x.v), x.dout)


@pytest.mark.parametrize("mask", [MASK, Mask.whole(40), Mask(40, ((0, 40),), causal=False)], ids=str)
def test_output_and_gradients_equal_the_formula(mask):
    x, seam = _example(), AttentionSeam(Formula())
    for got, wanted in zip(_run(x, lambda q, k, v: seam(q, k, v, mask)), reference(x, mask)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert seam.backend.scores == 2 * mask.area * x.q.shape[0] * x.q.shape[1]


def test_no_mask_is_one_causal_document():
    x, seam = _example(), AttentionSeam(Formula())
    assert torch.equal(seam(x.q, x.k, x.v), seam(x.q, x.k, x.v, Mask.whole(40)))


def test_gradcheck():
    x, seam = Example.random((1, 2, 1, 8), 5, dtype=torch.float64, device="cpu"), AttentionSeam(Formula())
    inputs = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    assert torch.autograd.gradcheck(lambda q, k, v: seam(q, k, v, Mask(5, ((0, 3), (3, 4))), scale=0.7), inputs)


def test_recompute_changes_nothing():
    x, seam = _example(), AttentionSeam(Formula())
    plain = _run(x, lambda q, k, v: seam(q, k, v, MASK))
    again = _run(x, lambda q, k, v: checkpoint(seam, q, k, v, MASK, use_reentrant=False))
    assert all(map(torch.equal, plain, again))
    # Forward and backward; forward, forward again and backward.
    assert seam.backend.scores == 5 * MASK.area * x.q.shape[0] * x.q.shape[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_have_the_dtype_of_the_inputs(dtype):
    class Wide(Formula):
        def forward(self, q, k, v, slices, scale):
            return super().forward(q.double(), k.double(), v.double(), slices, scale)

        def backward(self, *tensors):
            return super().backward(*(t.double() for t in tensors[:6]), *tensors[6:])

    assert {t.dtype for t in _run(_example(dtype), lambda q, k, v: AttentionSeam(Wide())(q, k, v, MASK))} == {dtype}


def test_backends_never_see_a_head_that_is_not_dense_in_memory():
    class Strict(Formula):
        def forward(self, *tensors):
            assert all(t.stride(-1) == 1 for t in tensors[:3])
            return super().forward(*tensors)

        def backward(self, *tensors):
            assert all(t.stride(-1) == 1 for t in tensors[:5])
            return super().backward(*tensors)

    x = _example()
    q, k, v = (t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in (x.q, x.k, x.v))
    assert q.stride(-1) != 1
    AttentionSeam(Strict())(q, k, v, MASK).sum().backward()  # the gradient of a sum is expanded: all strides 0
    assert q.grad is not None


def test_nothing_is_kept_without_gradients():
    x = _example()
    with torch.no_grad():
        assert AttentionSeam(Formula())(x.q, x.k, x.v, MASK).grad_fn is None


def test_a_seam_holds_no_parameters_and_says_what_it_is():
    seam = AttentionSeam(Formula())
    assert not list(seam.parameters())
    assert not list(seam.buffers())
    assert repr(seam) == "AttentionSeam(backend=formula)"


class _Plan:
    def stages(self, value_bytes, gradient_bytes):
        return (Stage(0, 0),), (Stage(0, 0),)


class _Scheme:
    name = "counting"

    def __init__(self):
        self.plans = 0

    def plan(self, mask, layout, rank, heads):
        self.plans += 1
        return _Plan()

    def forward(self, backend, plan, link, q, k, v, scale):
        return q.clone(), (q, q[..., 0])


def test_a_plan_is_made_once_per_batch():
    scheme = _Scheme()
    seam, x = AttentionSeam(Formula(), Exchange(scheme=scheme, link=None)), _example()
    for expected in (1, 2):
        mask = ShardedMask(Mask.whole(80), SequenceLayout.head_tail(80, 2), 0)
        for _ in range(3):
            seam(x.q, x.k, x.v, mask)
        assert scheme.plans == expected
    assert repr(seam) == "AttentionSeam(backend=formula, scheme=counting)"


def test_layers_of_other_windows_or_heads_get_plans_of_their_own():
    scheme, x = _Scheme(), _example()
    seams = [AttentionSeam(Formula(), Exchange(scheme=scheme, link=None), window=w) for w in (None, 7, 9)]
    asked = set()
    mask = ShardedMask(Mask.whole(80), SequenceLayout.head_tail(80, 2), 0, asked)
    for _ in range(2):
        for seam in seams:
            seam(x.q, x.k, x.v, mask)
            seam(x.q[:, :1], x.k[:, :1], x.v[:, :1], mask)
    assert scheme.plans == 6
    later = ShardedMask(Mask.whole(80), SequenceLayout.head_tail(80, 2), 0, asked)
    later.prepare()
    assert scheme.plans == 12
    seams[1](x.q, x.k, x.v, later)
    assert scheme.plans == 12
    assert repr(seams[1]) == "AttentionSeam(backend=formula, scheme=counting, window=7)"


@pytest.mark.parametrize(
    ("exchanged", "mask", "message"),
    [
        (False, Mask.whole(41), "got 40 tokens and a mask of 41"),
        (False, SHARDED, "over a whole row was given a mask of type ShardedMask"),
        (True, Mask.whole(40), "under context parallelism was given a mask of type Mask"),
        (True, None, "type NoneType: with --cp, and only then"),
    ],
)
def test_the_wrong_mask_is_named(exchanged, mask, message):
    x = _example()
    seam = AttentionSeam(Formula(), Exchange(scheme=_Scheme(), link=None) if exchanged else None)
    with pytest.raises(UsageError, match=message):
        seam(x.q, x.k, x.v, mask)
