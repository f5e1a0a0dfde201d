"""torch's CUDA attention operators against the formula, alone and shared out over simulated ranks."""

import pytest
import torch

from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import AttentionProblem, AttentionSlice, SliceRule
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention import flash, flash_versions, sdpa_cuda
from zoo.plugins.attention.dense import Dense
from zoo.plugins.attention.flash import Flash
from zoo.plugins.attention.flex import Flex
from zoo.plugins.attention.sdpa import Sdpa
from zoo.testing.attention import AttentionContract, Example, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class OnCuda(AttentionContract):
    device = "cuda"


class TestSdpaOnCuda(OnCuda):
    """Flash in bfloat16, memory-efficient in float32."""

    tolerances = {"float32": 1e-3, "bfloat16": 1e-1}

    @pytest.fixture
    def backend(self):
        return Sdpa()


class TestCudnn(OnCuda):
    tolerances = {"bfloat16": 1e-1}

    @pytest.fixture
    def backend(self):
        return sdpa_cuda.Cudnn()


class TestDenseOnCuda(OnCuda):
    tolerances = {"float64": 1e-10, "float32": 1e-3}

    @pytest.fixture
    def backend(self):
        return Dense()


def test_grouped_heads_are_not_repeated_by_flash():
    """The flash operator takes two key/value heads for eight query heads as they are."""
    q, k = (torch.randn(1, 64, n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (8, 2))
    out, lse = sdpa_cuda.Flash().forward(q, k, k, causal=True, scale=0.125)
    _, dk, _ = sdpa_cuda.Flash().backward(out, q, k, k, out, lse, causal=True, scale=0.125)
    assert out.shape == q.shape
    assert dk.shape == k.shape


@pytest.fixture(params=flash_versions.VERSIONS, ids=lambda version: version.name)
def only(request, monkeypatch):
    """flash-attn of one generation, as if no other were installed."""
    found = [v for v in flash_versions.installed()[0] if isinstance(v, request.param)]
    monkeypatch.setattr(flash, "installed", lambda: (tuple(found), ()))
    flash._choose.cache_clear()
    problem = AttentionProblem(device="cuda", dtype="bfloat16", head_dim=64, num_heads=4, num_kv_heads=2)
    reason = Flash().supports(problem)
    if reason is not None:
        pytest.skip(reason)
    yield
    flash._choose.cache_clear()


class TestFlashOnCuda(OnCuda):
    """Each generation that is installed and suits the device."""

    tolerances = {"bfloat16": 1e-1}

    @pytest.fixture
    def backend(self, only):
        return Flash()


class TestFlexOnCuda(OnCuda):
    """Compiled: the operators' backward pass from a row's final out and lse."""

    tolerances = {"float32": 1e-2, "bfloat16": 1e-1}

    @pytest.fixture
    def backend(self):
        return Flex()


GAPS = Mask(700, ((3, 200), (200, 201), (230, 650)))


@pytest.mark.parametrize("make", [Flash, Flex, Sdpa])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_rows_in_gaps_get_zeros_and_no_nan(make, size):
    """Segments without keys or without queries, in a batch, at each head size that has a kernel of its own."""
    problem = AttentionProblem(device="cuda", dtype="bfloat16", head_dim=size, num_heads=4, num_kv_heads=2)
    if reason := make().supports(problem):
        pytest.skip(reason)
    x = Example.random((2, 4, 2, size), GAPS.length, dtype=torch.bfloat16, device="cuda")
    slices = local_slices(GAPS, ((0, GAPS.length),))
    out, lse = make().forward(x.q, x.k, x.v, slices, x.scale)
    grads = make().backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)
    for got, wanted in zip((out, *grads), reference(x, GAPS), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-1)
    assert (lse[:, :, 201:230] == -torch.inf).all()
    assert all((grad[:, :, 201:230] == 0).all() for grad in grads)


def test_the_deterministic_backward_of_flash_is(only):
    x = Example.random((1, 8, 2, 128), 4096, dtype=torch.bfloat16, device="cuda")
    slices, backend = (AttentionSlice(0, 4096, 0, 4096, SliceRule.CAUSAL),), Flash(deterministic=True)
    out, lse = backend.forward(x.q, x.k, x.v, slices, x.scale)
    first, second = (backend.backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_flex_compiles_few_times_for_many_lengths():
    """Sizes change from step to step; each new one must not cost a compilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens in (300, 260, 513, 640, 700, 129):
        x = Example.random((1, 4, 2, 64), tokens, dtype=torch.bfloat16, device="cuda")
        slices = local_slices(Mask(tokens, ((0, 100), (100, tokens))), ((0, tokens),))
        out, lse = Flex().forward(x.q, x.k, x.v, slices, x.scale)
        Flex().backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
