"""The `sdpa` backend meets the contract on the CPU; what its CUDA operators need is checked as far as a CPU can."""

import math

import pytest
import torch

from zoo.core.contracts.attention import AttentionProblem
from zoo.plugins.attention import sdpa_cuda, sdpa_plugin
from zoo.plugins.attention.sdpa import Sdpa
from zoo.testing.attention import AttentionContract


class TestSdpa(AttentionContract):
    tolerances = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 6e-2}

    @pytest.fixture
    def backend(self):
        return Sdpa()


def _problem(**changes):
    fields = dict(device="cuda", dtype="bfloat16", head_dim=128, num_heads=8, num_kv_heads=2)
    return AttentionProblem(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": "float32"}, None),
        ({"dtype": "float64"}, "do not compute float64"),
        ({"head_dim": 100}, "multiple of 8, not 100"),
        ({"head_dim": 264}, "up to 256"),
        ({"dtype": "float32", "head_dim": 100}, None),
        ({"num_kv_heads": 3}, "evenly"),
        ({"device": "mps"}, "'mps'"),
        ({"device": "cpu", "dtype": "float64", "head_dim": 3}, None),
    ],
)
def test_supports_says_why_not(changes, reason):
    answer = Sdpa().supports(_problem(**changes))
    assert (answer is None) if reason is None else reason in answer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, None), ({"device": "cpu"}, "CUDA only"), ({"dtype": "float32"}, "float32"), ({"head_dim": 136}, "136")],
)
def test_cudnn_supports_says_why_not(changes, reason):
    answer = sdpa_cuda.Cudnn().supports(_problem(**changes))
    assert (answer is None) if reason is None else reason in answer


def test_kernels_are_chosen_by_dtype():
    assert isinstance(sdpa_cuda.kernel(torch.float32), sdpa_cuda.Efficient)
    assert isinstance(sdpa_cuda.kernel(torch.bfloat16), sdpa_cuda.Flash)


def test_sum_heads_is_the_derivative_of_expand_heads():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    wide = sdpa_cuda.expand_heads(x, 12)
    assert torch.equal(wide[:, 4], x[:, 1])  # query head n reads head n // (N // G)
    upstream = torch.randn_like(wide)
    (wanted,) = torch.autograd.grad(wide, x, upstream)
    torch.testing.assert_close(sdpa_cuda.sum_heads(upstream, 3).double(), wanted, rtol=1e-6, atol=1e-6)
    assert sdpa_cuda.expand_heads(x, 3) is x


@pytest.mark.parametrize(("rows", "padded"), [(1, 32), (32, 32), (33, 64)])
def test_lse_is_padded_to_whole_blocks_with_rows_of_no_weight(rows, padded):
    lse = torch.randn(1, 2, rows)
    wide = sdpa_cuda.pad_lse(lse)
    assert wide.shape == (1, 2, padded)
    assert torch.equal(wide[:, :, :rows], lse)
    assert (torch.exp(torch.zeros(()) - wide[:, :, rows:]) == 0).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_scaled_dot_product_flash_attention", 7),
        ("_scaled_dot_product_flash_attention_backward", 15),
        ("_scaled_dot_product_efficient_attention", 8),
        ("_scaled_dot_product_efficient_attention_backward", 13),
        ("_scaled_dot_product_cudnn_attention", 9),
        ("_scaled_dot_product_cudnn_attention_backward", 16),
    ],
)
def test_torch_still_has_the_operators_with_these_arguments(name, arguments):
    assert len(getattr(torch.ops.aten, name).default._schema.arguments) == arguments


def test_sdpa_is_chosen_only_where_it_can():
    assert sdpa_plugin.zoo_select_attention(_problem(), ["dense", "sdpa"]) == "sdpa"
    assert sdpa_plugin.zoo_select_attention(_problem(), ["mine"]) is None


def test_strided_heads_are_not_copied(monkeypatch):
    """The CPU operator reads what a projection or a K/V buffer leaves, so nothing calls contiguous()."""
    seen = []
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    inner = operator.default

    def spy(*args, **kwargs):
        seen.append([x.data_ptr() for x in args[:3]])
        return inner(*args, **kwargs)

    monkeypatch.setattr(operator, "default", spy)
    q, k, v = (torch.randn(1, 10, n, 8).transpose(1, 2) for n in (4, 2, 2))
    Sdpa().rectangle_forward(q, k, v, causal=True, scale=1 / math.sqrt(8))
    assert seen == [[q.data_ptr(), k.data_ptr(), v.data_ptr()]]
