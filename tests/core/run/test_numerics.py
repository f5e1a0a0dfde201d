"""The module named is the one that made the first value that is no number, in forward, between modules, or backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.core.run.nan_trace import traced


class Bad(nn.Module):
    """Makes its part of a step infinite."""

    def __init__(self, part):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.part = part

    def forward(self, x):
        y = self.inner(x)
        return Infinite.apply(y) if self.part == "backward" else y / 0.0 if self.part == "forward" else y


class Infinite(torch.autograd.Function):
    """The identity, with a gradient that is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Model(nn.Module):
    """Three blocks, the middle one bad; `between` divides by zero outside any module."""

    def __init__(self, part):
        super().__init__()
        self.first = Bad("none")
        self.middle = Bad(part)
        self.last = Bad("none")
        self.part = part

    def forward(self, x):
        x = self.middle(self.first(x))
        return self.last(x / 0.0 if self.part == "between" else x)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("forward", "in the output of middle"),
        ("between", "in the input of last"),
        # Backward comes from the end: the gradient of what `inner` gave is the first that the identity spoilt.
        ("backward", "in the gradient of the output of middle.inner"),
        ("none", None),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_module_is_named(part, where, recompute):
    model = Model(part)
    x = torch.ones(2, 4, requires_grad=True)
    with traced(model) as trace:
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.sum().backward()
    assert (trace.found[1] if trace.found else None) == where
    before = trace.events
    model(x).sum().backward()
    assert trace.events == before, "hooks are left behind"


def test_a_weight_that_is_no_number_is_named_and_not_what_it_spoils():
    model = Model("none")
    with torch.no_grad():
        model.middle.inner.bias[1] = float("inf")
    with traced(model) as trace:
        model(torch.ones(2, 4))
    assert trace.found[1] == "in the weight middle.inner.bias"
