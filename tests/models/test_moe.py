"""The mixture-of-experts block against a loop over tokens: nothing dropped, nothing added, every gradient there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from zoo.core.model.routing import by_expert, combine, permute, spread
from zoo.models.common import moe
from zoo.models.common.moe import GroupedMatmul, RouterStats, SparseMoE, balance_loss, init_experts, route

WIDTH, INNER, EXPERTS = 6, 10, 5


def made(top_k=2, *, seed=0):
    torch.manual_seed(seed)
    block = SparseMoE(WIDTH, INNER, EXPERTS, top_k).double()
    init_experts(block, std=0.5)
    return block


def token_by_token(block, h):
    """Every token alone, with the formulas as they stand in the paper."""
    out = []
    for token in h.flatten(0, 1):
        probabilities = (block.gate.weight @ token).softmax(0)
        chosen = probabilities.argsort(descending=True)[: block.num_experts_per_tok]
        shares = probabilities[chosen] / probabilities[chosen].sum()
        experts = [
            block.experts.w2[e] @ (functional.silu(block.experts.w1[e] @ token) * (block.experts.w3[e] @ token))
            for e in chosen
        ]
        out.append(sum(share * expert for share, expert in zip(shares, experts, strict=True)))
    return torch.stack(out).view_as(h)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(top_k):
    block, h = made(top_k), torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    leaves = [h, *block.parameters()]
    out, stats = block(h)
    wanted = token_by_token(block, h)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert stats.assignments.sum().item() == 18 * top_k
    found = torch.autograd.grad(out, leaves, seed)
    expected = torch.autograd.grad(wanted, leaves, seed, allow_unused=True)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-12)


def test_all_tokens_at_one_expert_are_all_served_and_idle_experts_get_zeros():
    block, h = made(1), torch.randn(1, 200, WIDTH, dtype=torch.float64).abs()
    with torch.no_grad():
        block.gate.weight.fill_(0)
        block.gate.weight[3] = 9
    out, stats = block(h)
    assert stats.assignments.tolist() == [0, 0, 0, 200, 0]
    torch.testing.assert_close(out, token_by_token(block, h), rtol=1e-12, atol=1e-12)
    out.sum().backward()
    for weight in block.experts.parameters():
        assert weight.grad[3].abs().min() > 0
        assert not weight.grad[[0, 1, 2, 4]].any()


class Poisoned(GroupedMatmul):
    """Leaves NaN in the rows that are nobody's, forward and backward, as a kernel may that does not look at them."""

    def forward(self, rows, weight, counts):
        nobodys = torch.arange(len(rows))[:, None] >= counts.sum()
        rows = rows.clone()
        rows.register_hook(lambda gradient: gradient.masked_fill(nobodys, torch.nan))
        return super().forward(rows, weight, counts).masked_fill(nobodys, torch.nan)


@pytest.mark.parametrize("kernel", [GroupedMatmul, Poisoned])
@pytest.mark.parametrize("real", [0, 1, 7, 18])
def test_padding_goes_to_no_expert_and_counts_nowhere(real, kernel):
    """The block on rows with padding beside the same block on the other tokens alone."""
    block, h = made(), torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    block.experts.matmul = kernel()
    padding = torch.ones(18, dtype=torch.bool)
    padding[torch.randperm(18)[:real]] = False
    out, stats = block(h, padding.view(2, 9))
    alone = made()
    wanted, expected = alone(h.flatten(0, 1)[~padding][None])
    assert not out.flatten(0, 1)[padding].any()
    torch.testing.assert_close(out.flatten(0, 1)[~padding], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=1e-12)
    leaves = [h, *block.parameters()], [h, *alone.parameters()]
    found = torch.autograd.grad(out.square().sum() + stats.probabilities.square().sum(), leaves[0])
    reference = torch.autograd.grad(wanted.square().sum() + expected.probabilities.square().sum(), leaves[1])
    for gradient, truth in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)


def test_a_row_of_padding_alone_has_no_balancing_loss():
    _, stats = route(torch.randn(5, EXPERTS), 2, torch.ones(5, dtype=torch.bool))
    assert balance_loss([stats], 2, stats.assignments).item() == 0


def test_no_token_at_all_is_no_special_case():
    block, h = made(), torch.zeros(1, 0, WIDTH, dtype=torch.float64, requires_grad=True)
    out, stats = block(h)
    (out.sum() + stats.probabilities.sum()).backward()
    assert out.shape == h.shape
    for parameter in block.parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0]], ids=str)
def test_a_grouped_product_is_one_product_a_group(counts):
    rows = torch.randn(sum(counts), 4, dtype=torch.float64)
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    found = GroupedMatmul()(rows, weight, torch.tensor(counts))
    start = 0
    for e, count in enumerate(counts):
        stop = start + count
        torch.testing.assert_close(found[start:stop], torch.einsum("ma,ba->mb", rows[start:stop], weight[e]))
        start = stop
    assert found.shape == (sum(counts), 5)


def test_copies_go_out_by_expert_and_come_back_to_their_token():
    ids = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    x = torch.arange(4.0)[:, None].requires_grad_()
    arranged = by_expert(ids)
    rows = spread(x, arranged)
    assert rows.flatten().tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    weights = torch.full((4, 2), 0.5)
    torch.testing.assert_close(combine(rows, weights, arranged), x)
    assert permute(rows, arranged).shape == rows.shape
    (rows[:, 0] * torch.arange(8.0)).sum().backward()
    assert x.grad.flatten().tolist() == [5, 1 + 3, 4 + 6, 2 + 7]


def test_gradients_of_spread_and_combine_are_those_of_finite_differences():
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    arranged = by_expert(ids)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: combine(spread(x, arranged).sin(), w, arranged), (x, weights))


def test_the_router_computes_in_fp32_and_keeps_fp64():
    logits = torch.randn(7, EXPERTS, dtype=torch.float64)
    assert route(logits, 2)[0].weights.dtype == torch.float64
    assert route(logits.bfloat16(), 2)[0].weights.dtype == torch.float32
    torch.testing.assert_close(route(logits, 2)[0].weights.sum(1), torch.ones(7, dtype=torch.float64))


def test_parts_of_a_row_add_up_to_its_balancing_loss():
    logits = torch.randn(2, 40, EXPERTS, dtype=torch.float64)
    whole = [route(layer, 2)[1] for layer in logits]
    row = sum(stats.assignments for stats in whole)
    parts = [balance_loss([route(layer[cut], 2)[1] for layer in logits], 2, row) for cut in (slice(13), slice(13, 40))]
    torch.testing.assert_close(sum(parts), balance_loss(whole, 2, row), rtol=1e-13, atol=0)


def test_a_perfectly_balanced_router_costs_k():
    even = RouterStats(torch.full((4,), 10.0), torch.full((4,), 20))
    assert balance_loss([even], 2, even.assignments).item() == pytest.approx(2.0)


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [1, 5, 1]], ids=str)
def test_the_devices_grouped_kernel_is_the_same_function(counts, monkeypatch):
    """torch has it on a CPU too, where it is no faster than the loop, so it is chosen by hand here."""
    rows, weight = torch.randn(7, 8), torch.randn(3, 12, 8)
    seed, results = torch.randn(7, 12), []
    for kernels in (set(), {("cpu", torch.float32)}):
        monkeypatch.setattr(moe, "_ONE_KERNEL", kernels)
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        out = GroupedMatmul()(*leaves, torch.tensor(counts))
        assert ("Grouped" in str(out.grad_fn)) == bool(kernels)
        results.append((out, *torch.autograd.grad(out, leaves, seed)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
