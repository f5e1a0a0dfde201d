"""Bounds of rounding hold for what rounds, and not for what is wrong."""

from __future__ import annotations

import pytest
import torch

from tools.reference import draw_fields, gradients, pair, token_loss
from tools.rounding import rounding


@pytest.mark.parametrize("terms", [1, 100, 10_000])
def test_a_sum_in_fp32_is_within_its_bound_in_any_order_and_a_term_too_many_is_not(terms):
    x = torch.randn(50, terms, generator=torch.Generator().manual_seed(terms))
    share = rounding(lambda: {"sum": x.double().sum(1)}, torch.float32)
    one_by_one = torch.zeros(50)
    for column in x.unbind(1):
        one_by_one += column
    assert share("sum", x.sum(1)) <= 1
    assert share("sum", one_by_one) <= 1
    assert share("sum", x.double().sum(1) + x[:, 0]) > 1


def test_nothing_that_a_step_reads_is_moved_and_the_bound_is_the_same_every_time():
    theirs, ours = pair(draw_fields(0, "mixtral"))
    ours.double()
    tokens = torch.arange(30)[None]
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}

    def step():
        ours.zero_grad()
        token_loss(ours, tokens, tokens).backward()
        return {name: gradient.clone() for name, gradient in gradients(ours).items()}

    shares = [{name: share(name, truth + 1e-6) for name, truth in step().items()} for share in _twice(step)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
    assert all(torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())


def _twice(step):
    return [rounding(step, torch.float32) for _ in range(2)]


@pytest.mark.parametrize("family", ["llama3", "mixtral", "nemotron"])
@pytest.mark.parametrize("fault", ["theta", "weight"])
def test_small_faults_are_seen(family, fault):
    """A base of the angles that is off by 0.1 %, and one weight that is off by 1e-3."""
    fields = draw_fields(0, family)
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    with torch.no_grad():
        if fault == "weight":
            next(iter(theirs.model.layers)).self_attn.q_proj.weight[0, 0] += 1e-3
        else:
            theirs.model.rotary_emb.inv_freq *= 1.001 ** -torch.linspace(0, 1, len(theirs.model.rotary_emb.inv_freq))
        share = rounding(lambda: {"logits": ours.double()(tokens)}, torch.float32)
        assert share("logits", theirs(tokens).logits) > 1
