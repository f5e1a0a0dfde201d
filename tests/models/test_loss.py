"""The chunked loss against torch's cross entropy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional

from zoo.core.contracts.batch import IGNORE
from zoo.models.common import loss
from zoo.models.common.loss import TokenLoss


@pytest.fixture(params=["cpu path", "accelerator path"])
def path(request, monkeypatch):
    """Rows of ignored labels are dropped on a CPU and masked elsewhere; both run here, in several chunks."""
    monkeypatch.setattr(loss, "chunk_rows", lambda _vocab, _device: 7)
    if request.param == "accelerator path":
        monkeypatch.setattr(loss, "_drops_ignored", lambda _labels: False)


def gradients(total, *parameters):
    total.backward()
    found = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_equals_cross_entropy_in_fp64(ignored):
    torch.manual_seed(0)
    hidden = torch.randn(2, 25, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (2, 25)).masked_fill(torch.rand(2, 25) < ignored, IGNORE)
    total = TokenLoss()(hidden, weight, labels)
    assert total.shape == ()
    assert total.dtype is torch.float64
    expected = functional.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    found, reference = gradients(total / 3, hidden, weight), gradients(expected / 3, hidden, weight)
    for mine, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), vocab=st.integers(2, 50), chunk=st.integers(1, 41), scale=st.sampled_from([0.1, 1000.0])
)
def test_any_chunk_size_gives_the_same(rows, vocab, chunk, scale):
    generator = torch.Generator().manual_seed(rows * 100 + vocab)
    hidden = scale * torch.randn(1, rows, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (1, rows), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "chunk_rows", lambda _vocab, _device: chunk)
        total = TokenLoss()(hidden, weight, labels)
    expected = functional.cross_entropy((hidden @ weight.t())[0], labels[0], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_weight_shared_with_the_embedding_gets_both_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 8, dtype=torch.float64)
    tokens, labels = torch.randint(0, 20, (1, 15)), torch.randint(0, 20, (1, 15))
    (mine,) = gradients(TokenLoss()(embedding(tokens), embedding.weight, labels), embedding.weight)
    logits = embedding(tokens) @ embedding.weight.t()
    (theirs,) = gradients(functional.cross_entropy(logits[0], labels[0], reduction="sum"), embedding.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("path")
def test_bfloat16_sums_and_accumulates_in_fp32():
    torch.manual_seed(0)
    hidden = torch.randn(1, 500, 32).bfloat16().requires_grad_()
    weight = (torch.randn(64, 32) / 6).bfloat16().requires_grad_()
    labels = torch.randint(0, 64, (1, 500))
    total = TokenLoss()(hidden, weight, labels)
    assert total.dtype is torch.float32
    exact = (hidden.detach().double(), weight.detach().double())
    exact_hidden, exact_weight = (tensor.requires_grad_() for tensor in exact)
    expected = functional.cross_entropy((exact_hidden @ exact_weight.t())[0], labels[0], reduction="sum")
    assert abs(total.item() - expected.item()) < 2e-3 * expected.item()
    (mine,), (theirs,) = gradients(total, weight), gradients(expected, exact_weight)
    assert (mine - theirs).norm() < 3.5e-3 * theirs.norm()


def test_frozen_sides_and_no_grad():
    hidden, labels = torch.randn(1, 9, 4, requires_grad=True), torch.randint(0, 6, (1, 9))
    frozen = torch.randn(6, 4)
    TokenLoss()(hidden, frozen, labels).backward()
    assert frozen.grad is None
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        assert not TokenLoss()(hidden, frozen, labels).requires_grad
    assert not TokenLoss()(hidden.detach(), frozen, labels).requires_grad


def test_second_backward_is_an_error_and_not_a_wrong_gradient():
    hidden, labels = torch.randn(1, 9, 4, requires_grad=True), torch.randint(0, 6, (1, 9))
    total = TokenLoss()(hidden, torch.randn(6, 4), labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        total.backward()


def test_a_label_outside_the_vocabulary_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        TokenLoss()(torch.randn(1, 2, 4), torch.randn(6, 4), torch.tensor([[1, 6]]))


def test_logits_never_exist_whole(monkeypatch):
    seen = []
    chunk = loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda rows, *rest: seen.append(len(rows)) or chunk(rows, *rest))
    TokenLoss()(torch.randn(1, 3000, 4), torch.randn(32_000, 4), torch.zeros(1, 3000, dtype=torch.int64))
    assert sum(seen) == 3000
    assert max(seen) * 32_000 * 4 <= 32 << 20
