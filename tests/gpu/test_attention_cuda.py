"""torch's CUDA attention operators against the formula, alone and shared out over simulated ranks."""

import pytest
import torch

from zoo.plugins.attention import sdpa_cuda
from zoo.plugins.attention.dense import Dense
from zoo.plugins.attention.sdpa import Sdpa
from zoo.testing.attention import AttentionContract

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
