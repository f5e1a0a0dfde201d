"""Every mix of axes is the same function: all numbers of two steps equal the single process, in fp64."""

from __future__ import annotations

import pytest
import torch

from tests import pipeline_model
from tests.distributed import ranks
from tests.distributed.test_equality_pipeline import assert_same, single

pytestmark = pytest.mark.dist

CASES = [
    # 4 ranks
    ("llama-tied", {"dp_replicate": 2, "tp": 2}, {}),
    ("nemotron", {"dp_shard": 2, "tp": 2}, {"data_parallel": "ddp"}),
    ("llama", {"dp_shard": 2, "tp": 2}, {"data_parallel": "zero1", "sequence_parallel": False}),
    ("llama-tied", {"pp": 2, "tp": 2}, {"schedule": "interleaved", "memory": "full"}),
    ("nemotron-nas", {"pp": 2, "tp": 2}, {"number": 4}),
    ("llama", {"pp": 2, "dp_shard": 2}, {"data_parallel": "ddp"}),
    ("llama-tied", {"pp": 2, "dp_shard": 2}, {"data_parallel": "zero1"}),
    ("nemotron", {"pp": 2, "dp_replicate": 2}, {"schedule": "zero-bubble"}),
    ("mixtral-aux", {"cp": 2, "tp": 2, "ep": 2}, {}),
    ("mixtral-aux", {"dp_replicate": 2, "cp": 2, "ep": 2}, {"data_parallel": "ddp"}),
    # 8 ranks
    ("llama-tied", {"pp": 2, "cp": 2, "tp": 2}, {"schedule": "zbv"}),
    ("nemotron", {"pp": 2, "cp": 2, "tp": 2}, {"memory": "full"}),
    ("llama", {"pp": 2, "dp_replicate": 2, "dp_shard": 2}, {}),
    ("llama-tied", {"dp_replicate": 2, "cp": 2, "tp": 2}, {"data_parallel": "zero1"}),
    ("mixtral-aux", {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 4}, {"number": 8}),
    ("mixtral", {"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2}, {}),
    ("mixtral-aux", {"pp": 2, "cp": 2, "tp": 2, "ep": 2}, {"schedule": "interleaved"}),
]


@pytest.mark.parametrize(("model", "degrees", "options"), CASES, ids=str)
def test_any_mix_equals_one_process(model, degrees, options):
    world = torch.tensor([size for axis, size in degrees.items() if axis != "ep"]).prod().item()
    wanted = single(model, options.get("number", pipeline_model.ROWS))
    found = {}
    for result in ranks.run(world, pipeline_model.two_steps_of, model, degrees, options):
        assert_same(result, wanted)
        found |= result
    assert found.keys() == wanted.keys()
