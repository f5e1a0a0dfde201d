"""Tensor and sequence parallelism are the same function: every number of two steps equals one process, in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import tensor_model
from tests.distributed import ranks

pytestmark = pytest.mark.dist

LAYOUTS = [
    ({"tp": 2}, [("untied", True), ("untied", False), ("nemotron", True), ("nas", False), ("mixtral", True)]),
    ({"tp": 4}, [("untied", False), ("tied", True), ("tied", False), ("nas", True), ("nemotron", True)]),
    ({"tp": 2, "cp": 2}, [("untied", True, "full"), ("tied", False), ("nas", True, "full"), ("nemotron", True)]),
    ({"tp": 2, "cp": 2, "ep": 2}, [("mixtral", True)]),
    ({"tp": 2, "dp_shard": 2}, [("tied", True), ("untied", False), ("nemotron", False, "full")]),
    ({"tp": 2, "cp": 2, "dp_shard": 2}, [("untied", True), ("tied", False), ("nemotron", True)]),
    ({"tp": 2, "cp": 2, "dp_shard": 2, "ep": 4}, [("mixtral", True, "full")]),
]
"""Degrees, and cases: model, whether sequence parallel, memory policy."""


@cache
def single(model):
    return tensor_model.two_steps({}, model)


def steps_of(degrees, cases):
    """On a rank: what two steps leave for each case; only the first rank's answer travels."""
    results = [tensor_model.two_steps(degrees, *case) for case in cases]
    return results if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize(("degrees", "cases"), LAYOUTS, ids=[str(degrees) for degrees, _ in LAYOUTS])
def test_any_tp_equals_one_process(degrees, cases):
    world = degrees["tp"] * degrees.get("dp_shard", 1) * degrees.get("cp", 1)
    results = ranks.run(world, steps_of, degrees, cases)[0]
    for case, result in zip(cases, results, strict=True):
        wanted = single(case[0])
        assert result.keys() == wanted.keys()
        for name, value in result.items():
            torch.testing.assert_close(
                value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
            )
