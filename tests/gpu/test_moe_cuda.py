"""The mixture-of-experts block on a CUDA device: one kernel for all experts, equal to the loop, and the same twice."""

import pytest
import torch

from zoo.models.common import moe
from zoo.models.common.moe import SparseMoE, init_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def outcome(block, h, seed):
    """Output and every gradient."""
    leaf = h.clone().requires_grad_()
    out, _ = block(leaf)
    return out.detach(), *torch.autograd.grad(out, [leaf, *block.parameters()], seed)


@pytest.mark.parametrize("tokens", [1, 7, 333])
def test_the_grouped_kernel_equals_the_loop_and_itself(tokens, monkeypatch):
    torch.manual_seed(0)
    block = SparseMoE(64, 96, 8, 2)
    init_experts(block, std=0.1)
    block = block.to("cuda", torch.bfloat16)
    h, seed = (torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found, again = outcome(block, h, seed), outcome(block, h, seed)
    monkeypatch.setattr(moe, "_ONE_KERNEL", set())
    for first, second, wanted in zip(found, again, outcome(block, h, seed), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, wanted, rtol=2e-2, atol=2e-2)
