"""Schedule, weight decay groups and the gradient norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.core.job.job import OptimSection, ScheduleSection
from zoo.core.run.optim import build_optimizer, build_schedule, clip_gradients


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_rises_then_falls_to_the_final_share_at_the_last_step(decay):
    share = build_schedule(ScheduleSection(steps=20, warmup=4, decay=decay, final=0.1))
    rates = [share(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_one_step_trains_at_the_full_rate():
    assert build_schedule(ScheduleSection(steps=1))(0) == 1.0


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = build_optimizer(model, OptimSection(weight_decay=0.5)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_the_norm_is_returned_and_only_larger_ones_are_cut(limit):
    model = nn.Linear(3, 4).double()
    model(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    norm = clip_gradients(model, limit)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-12)
    wanted = before if limit in (0.0, 1e9) else before * limit / before.norm()
    # torch adds 1e-6 to the norm it divides by.
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=0)
