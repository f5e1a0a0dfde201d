"""Expert parallelism is the same function: every number of two steps equals the single process, in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import sparse_model
from tests.distributed import ranks

pytestmark = pytest.mark.dist

CASES = [(0.05, True), (None, False)]
"""Coefficient of the auxiliary loss, and whether the router is so biased that some experts stay empty."""
LAYOUTS = [
    {"dp_shard": 2},
    {"cp": 2},
    {"dp_shard": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"dp_shard": 2, "cp": 2},
    {"dp_shard": 2, "cp": 2, "ep": 2},
    {"dp_shard": 2, "cp": 2, "ep": 4},
    {"dp_shard": 4, "ep": 4},
    {"dp_shard": 4, "cp": 2, "ep": 4},
    {"dp_shard": 4, "cp": 2, "ep": 8},
    {"dp_shard": 8, "ep": 8},
]


@cache
def single(coefficient, biased):
    return sparse_model.two_steps({}, coefficient, biased)


def every_case(degrees, memory):
    """On a rank: what two steps leave, for each case; only the first rank's answer travels."""
    results = [sparse_model.two_steps(degrees, *case, memory) for case in CASES]
    return results if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_any_ep_equals_one_process(degrees):
    check(degrees, "none")


def test_blocks_that_run_twice_dispatch_twice_alike():
    check({"dp_shard": 2, "cp": 2, "ep": 2}, "full")


def check(degrees, memory):
    world = degrees.get("dp_shard", 1) * degrees.get("cp", 1)
    results = ranks.run(world, every_case, degrees, memory)[0]
    for case, result in zip(CASES, results, strict=True):
        wanted = single(*case)
        assert result.keys() == wanted.keys()
        for name, value in result.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_biased_case_leaves_experts_empty_and_the_others_uneven():
    result = single(*CASES[0])
    for step in (1, 2):
        load = result[f"{step}.expert_load"]
        assert load[list(sparse_model.IDLE)].tolist() == [0, 0]
        assert load.sum().item() == pytest.approx(1)
        assert load.max() > 2 * load[load > 0].min()
    for name, value in result.items():
        if "gradient" in name and ".experts." in name:
            assert not value[list(sparse_model.IDLE)].any()
            assert value.any()
