"""Globs over names, and seams that hold no parameters."""

from __future__ import annotations

import pytest
from torch import nn

from zoo.core.contracts.globs import find_modules, matches
from zoo.core.errors import UsageError
from zoo.core.model.seams import replace_modules


def model():
    layers = nn.ModuleDict({str(i): nn.ModuleDict({"core": nn.Identity(), "proj": nn.Linear(2, 2)}) for i in range(3)})
    return nn.ModuleDict({"layers": layers})


@pytest.mark.parametrize(
    ("name", "glob", "expected"),
    [("a.0.b", "a.*.b", True), ("a.0.1.b", "a.*.b", False), ("a.b", "a.*.b", False), ("a.10", "a.*", True)],
)
def test_a_star_is_exactly_one_atom(name, glob, expected):
    assert matches(name, glob) is expected


def test_a_glob_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(UsageError, match=r"layers.\*.nothing"):
        find_modules(model(), "layers.*.nothing")


def test_swapping_keeps_every_parameter_name():
    net = model()
    before = [name for name, _ in net.named_parameters()]
    assert replace_modules(net, "layers.*.core", lambda old: nn.Dropout(0.0), owner="test") == 3
    assert [name for name, _ in net.named_parameters()] == before
    assert isinstance(net.get_submodule("layers.1.core"), nn.Dropout)


@pytest.mark.parametrize("glob", ["layers.*.proj", "layers.*.core"])
def test_nothing_with_parameters_may_be_a_seam(glob):
    with pytest.raises(UsageError, match="no parameters"):
        replace_modules(model(), glob, lambda old: nn.Linear(2, 2), owner="test")
