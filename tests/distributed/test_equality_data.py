"""Data parallelism of every kind is the same function: every number of two steps equals the single process, in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import sparse_model
from tests.distributed import ranks
from zoo.models.llama3.model import SPEC as LLAMA

pytestmark = pytest.mark.dist

LAYOUTS = {
    2: [
        ({"dp_replicate": 2}, {"data_parallel": "fsdp"}),
        ({"dp_shard": 2}, {"data_parallel": "fsdp", "reshard": False}),
        ({"dp_shard": 2}, {"data_parallel": "ddp"}),
        ({"cp": 2}, {"data_parallel": "ddp"}),
        ({"dp_replicate": 2}, {"data_parallel": "zero1"}),
        ({"cp": 2}, {"data_parallel": "zero1"}),
    ],
    4: [
        ({"dp_replicate": 2, "dp_shard": 2}, {"data_parallel": "fsdp"}),
        ({"dp_replicate": 2, "cp": 2}, {"data_parallel": "fsdp", "memory": "full"}),
        ({"dp_replicate": 2, "cp": 2, "ep": 2}, {"data_parallel": "fsdp"}),
        ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {"data_parallel": "ddp", "memory": "full"}),
        ({"dp_shard": 2, "cp": 2, "ep": 2}, {"data_parallel": "ddp"}),
        ({"dp_shard": 2, "cp": 2, "ep": 4}, {"data_parallel": "zero1"}),
        ({"dp_shard": 2, "cp": 2, "ep": 2}, {"data_parallel": "zero1", "memory": "full"}),
    ],
    8: [
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 2}, {"data_parallel": "fsdp"}),
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 2}, {"data_parallel": "ddp"}),
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 2}, {"data_parallel": "zero1"}),
    ],
}
"""By world size: degrees, and how weights live over them."""


def named(case):
    degrees, choices = case
    return "-".join([*(f"{axis}{n}" for axis, n in degrees.items()), *(str(v) for v in choices.values())])


CASES = [pytest.param(world, *case, id=named(case)) for world, cases in LAYOUTS.items() for case in cases]


def tied_llama():
    """A small Llama whose embedding and head are one tensor."""
    config = LLAMA.parse(
        {
            "model_type": "llama",
            "vocab_size": sparse_model.VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": sparse_model.LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
    )
    torch.manual_seed(5)
    return LLAMA, config, LLAMA.build(config).double()


def two_steps(degrees, choices):
    """On a rank: what two steps of several microbatches leave of Mixtral and, without `ep`, of a tied Llama."""
    results = [sparse_model.two_steps(degrees, 0.05, False, **choices)]
    if "ep" not in degrees:
        results.append(sparse_model.two_steps(degrees, None, False, model=tied_llama(), **choices))
    # Only the first rank's answer travels.
    return results if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0 else None


@cache
def single():
    return two_steps({}, {})


@pytest.mark.parametrize(("world", "degrees", "choices"), CASES)
def test_any_data_parallelism_equals_one_process(world, degrees, choices):
    results = ranks.run(world, two_steps, degrees, choices)[0]
    assert len(results) == (1 if "ep" in degrees else 2)
    for result, wanted in zip(results, single(), strict=False):
        assert result.keys() == wanted.keys()
        for name, value in result.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
