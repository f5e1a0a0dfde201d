"""A run saved under any layout goes on under any other, as if nothing had happened: weights, moments, rows; in fp64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.distributed.tensor import DTensor, distribute_tensor

from tests import sparse_model
from tests.distributed import ranks
from zoo.core import checkpoint
from zoo.core.batch import Row
from zoo.core.checkpoint import Checkpoints
from zoo.core.contracts import Setup
from zoo.core.feed import Feed, reads_data
from zoo.core.mesh import Degrees, Mesh
from zoo.core.metrics import Meter, Pending
from zoo.core.windows import Stats

pytestmark = pytest.mark.dist

FSDP, ZERO1, DDP = ({"data_parallel": name} for name in ("fsdp", "zero1", "ddp"))
LAYOUTS = {
    1: {"single": ({}, FSDP)},
    2: {"ddp": ({"dp_shard": 2}, DDP), "zero1": ({"dp_replicate": 2}, ZERO1)},
    4: {
        "fsdp": ({"dp_shard": 4}, FSDP),
        "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, FSDP),
        "zero1-cp": ({"dp_shard": 2, "cp": 2}, ZERO1),
        "ddp-ep": ({"dp_replicate": 2, "cp": 2, "ep": 2}, DDP),
        "fsdp-ep": ({"dp_shard": 2, "cp": 2, "ep": 4}, FSDP),
    },
}
"""World size to layouts of a Mixtral."""
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


def state(run):
    """Weights and both moments by name."""
    return dict(run.model.named_parameters()) | sparse_model.moments(run)


def saved(folder, layouts):
    """On a rank: for each layout a run of one step, saved."""
    for name, (degrees, choices) in layouts.items():
        run = sparse_model.Run(degrees, **choices)
        run.step(micro_batch=sparse_model.ROWS)
        Checkpoints(folder / name, keep=1).save(run.state, {"step": run.state.step}, {})


def resumed(folder, layouts, wanted):
    """On a rank: under each layout two steps more of every saved run, and how far its part is from what is wanted."""
    result = {}
    for name, (degrees, choices) in layouts.items():
        # Other weights than were saved.
        run = sparse_model.Run(degrees, biased=True, **choices)
        for before in NAMES:
            checkpoint.load(run.state, folder / before / "checkpoints" / "step-1")
            run.step(micro_batch=sparse_model.ROWS)
            run.step(micro_batch=sparse_model.ROWS)
            found = state(run)
            assert run.state.step == 3
            assert found.keys() == wanted.keys()
            result[before, name] = {key: distance(value.detach(), wanted[key]) for key, value in found.items()}
    return result


def distance(part, whole):
    """The largest difference of this rank's part of a tensor, as a share of the largest number in the whole."""
    mine = whole
    if isinstance(part, DTensor):
        mine = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None).to_local()
        part = part.to_local()
    assert part.shape == mine.shape
    return ((part - mine).abs().max() / whole.abs().max()).item() if part.numel() else 0.0


def test_every_layout_resumes_every_other(tmp_path):
    uninterrupted = sparse_model.Run({})
    for _ in range(3):
        uninterrupted.step()
    wanted = {name: value.detach() for name, value in state(uninterrupted).items()}
    for world, layouts in LAYOUTS.items():
        ranks.run(world, saved, tmp_path, layouts)
    pairs = set()
    for world, layouts in LAYOUTS.items():
        for answer in ranks.run(world, resumed, tmp_path, layouts, wanted):
            pairs |= answer.keys()
            for pair, distances in answer.items():
                for name, value in distances.items():
                    assert value < 1e-9, (pair, name)
    assert len(pairs) == len(NAMES) ** 2


# Rows ---------------------------------------------------------------------------------------------


class Numbered:
    """Rows whose tokens are the row's number, from where a cursor stands."""

    def __init__(self, cursor):
        self.row = cursor["row"]

    def take(self, count):
        numbers = range(self.row, self.row + count)
        self.row += count
        return [Row(tokens=np.full(4, n), labels=np.full(4, n), documents=((0, 4),)) for n in numbers]

    def state_dict(self):
        return {"row": self.row}

    stats, fill = Stats(), 1.0


def fed(degrees, cursor, steps):
    """On a rank: the rows of each of its steps, which of them are its own, and the cursor afterwards."""
    degrees = Degrees(**degrees)
    mesh = Mesh(degrees, "cpu")
    stream = Numbered(cursor) if reads_data(mesh) else None
    setup = Setup(seq=4, context=None, dtype="float64", master_dtype="float64")
    feed = Feed(
        stream, mesh=mesh, degrees=degrees, adapters=[], setup=setup, global_batch=8, micro_batch=1, steps=steps
    )
    data = [feed.step(torch.device("cpu")) for _ in range(steps)]
    feed.close()
    return [[int(b.tokens[0, 0]) for b in step.batches] for step in data], data[-1].position.cursor


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 2, "cp": 2}),
        ({"dp_shard": 2, "cp": 2}, {"dp_replicate": 4}),
    ],
)
def test_another_number_of_data_parallel_ranks_goes_on_at_the_same_row(first, then):
    cursor, seen = {"row": 0}, []
    for degrees in (first, then):
        answers = ranks.run(4, fed, degrees, cursor, 2)
        peers = degrees.get("cp", 1)
        for step in range(2):
            # Peers have the same rows, and data-parallel ranks follow each other in the order of their rank.
            assert all(answers[r][0][step] == answers[r - r % peers][0][step] for r in range(4))
            seen += [row for answer in answers[::peers] for row in answer[0][step]]
        cursor = answers[0][1]
    assert seen == list(range(32))
    assert cursor == {"row": 32}


# What is logged -----------------------------------------------------------------------------------


def logged(degrees, choices, micro_batch):
    """On a rank: what metrics.jsonl gets of two steps, but for times."""
    run = sparse_model.Run(degrees, **choices)
    device = torch.device("cpu")
    meter = Meter(
        seq=sparse_model.SEQ,
        global_batch=sparse_model.ROWS,
        world_size=dist.get_world_size(),
        peak_tflops=1.0,
        device=device,
    )
    trained = sum(row.trained_tokens for row in sparse_model.rows())
    for _ in range(2):
        result = run.update(micro_batch)
        meter.add(Pending(run.state.step, result, trained, 1.0, 0.0))
    timed = ("tokens_per_s", "tokens_per_s_per_rank", "mfu", "mem_peak_gib", "step_s", "data_s")
    return [{key: value for key, value in row.items() if key not in timed} for row in meter.flush()]


@cache
def logged_alone():
    return ranks.run(1, logged, {}, FSDP, 1)[0]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_logged_does_not_depend_on_ranks_or_microbatches(data):
    name = data.draw(st.sampled_from(NAMES), label="layout")
    world, (degrees, choices) = next((w, layouts[name]) for w, layouts in LAYOUTS.items() if name in layouts)
    each = sparse_model.ROWS // Degrees(**degrees).dp
    micro_batch = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if each % n == 0]), label="rows a microbatch")
    for answer in ranks.run(world, logged, degrees, choices, micro_batch):
        for row, wanted in zip(answer, logged_alone(), strict=True):
            assert row.keys() == wanted.keys()
            for key, value in row.items():
                assert value == pytest.approx(wanted[key], rel=1e-9, abs=1e-9), key
