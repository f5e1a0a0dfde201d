"""A run saved under any layout goes on under any other, as if nothing had happened: weights, moments, rows; in fp64."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.harness import layouts
from zoo.core.contracts.batch import Row
from zoo.core.contracts.layout import Layout
from zoo.core.data.packing import Stats
from zoo.core.mesh.degrees import Degrees
from zoo.core.mesh.mesh import Mesh
from zoo.core.run import checkpoint
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.feed import Feed, reads_data
from zoo.core.run.metrics import Meter, Pending
from zoo.testing import ranks

pytestmark = pytest.mark.dist

LAYOUTS = (
    "",
    "dp_shard2 ddp",
    "pp2 zero-bubble",
    "tp4",
    "dp_replicate2 dp_shard2 ep2",
    "dp_shard2 cp2 ep4 zero1",
    "pp2 tp2",
    "pp2 cp2 tp2 ep2",
)
"""Of a Mixtral of two layers, with four rows a step."""
TIED = ("", "pp2 zbv", "tp4", "dp_shard2 cp2 zero1", "pp2 tp2 interleaved")
"""Of a Llama of four layers whose embedding and head are one tensor."""


def saved(folder, chosen):
    """On a rank: a run of one step, saved."""
    run = layouts.Run(chosen)
    run.step(micro_batch=2)
    Checkpoints(folder, keep=1).save(run.state, {"step": run.state.step}, {})


def resumed(folders, chosen, wanted):
    """On a rank: two steps more of saved runs under a layout; of each what differs from what is wanted, and names."""
    run = layouts.Run(chosen)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    result = []
    for folder in folders:
        checkpoint.load(run.state, folder / "checkpoints" / "step-1")
        found = run.steps(2, micro_batch=2)
        assert run.state.step == 3
        result.append((layouts.differences(found, wanted), sorted(found)))
    return result


def check(root, model, more, pairs):
    """Of each pair, the second goes on with what was saved under the first, as the single process does."""
    every = {words: layouts.choose(model, f"{words} {more}") for pair in pairs for words in pair}
    folders = {words: root / str(number) for number, words in enumerate(every)}
    every = dict(sorted(every.items(), key=lambda item: item[1].degrees.world_size))
    for words, chosen in every.items():
        ranks.run(chosen.degrees.world_size, saved, folders[words], chosen)
    wanted = layouts.wanted(every[""])
    continued = {name for name in wanted if not name.startswith("1.")}
    for words, chosen in every.items():
        befores = [before for before, after in pairs if after == words]
        asked = [folders[before] for before in befores], chosen, wanted
        answers = ranks.run(chosen.degrees.world_size, resumed, *asked)
        for before, *of_ranks in zip(befores, *answers, strict=True):
            for differences, _ in of_ranks:
                assert not differences, (before, words, differences[:5])
            assert set().union(*(names for _, names in of_ranks)) == continued, (before, words)


def test_every_layout_resumes_every_other(tmp_path):
    pairs = list(itertools.product(LAYOUTS, LAYOUTS))
    assert len(pairs) == 64
    check(tmp_path, "mixtral-plain", "rows4 layers2", pairs)


def test_tied_embeddings_resume_under_the_next_layout(tmp_path):
    check(tmp_path, "llama-tied", "rows4 layers4", list(itertools.pairwise((*TIED, TIED[0]))))


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
    layout = Layout(seq=4, degrees=degrees, microbatches=8 // degrees.dp, dtype="float64")
    feed = Feed(stream, mesh=mesh, adapters=[], layout=layout, steps=steps)
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


def logged(chosen, micro_batch):
    """On a rank: what metrics.jsonl gets of two steps, but for times."""
    run = layouts.Run(chosen)
    meter = Meter(
        seq=layouts.SEQ,
        global_batch=chosen.rows,
        world_size=dist.get_world_size(),
        peak_tflops=1.0,
        device=torch.device("cpu"),
    )
    trained = sum(row.trained_tokens for row in layouts.rows(chosen.rows))
    for _ in range(2):
        result = run.update(micro_batch)
        meter.add(Pending(run.state.step, result, trained, 1.0, 0.0))
    timed = ("tokens_per_s", "tokens_per_s_per_rank", "mfu", "mem_peak_gib", "step_s", "data_s")
    return [{key: value for key, value in row.items() if key not in timed} for row in meter.flush()]


@cache
def logged_alone():
    return ranks.run(1, logged, layouts.choose("mixtral-plain", "rows8 layers2"), 1)[0]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_logged_does_not_depend_on_ranks_or_microbatches(data):
    words = data.draw(st.sampled_from(LAYOUTS), label="layout")
    chosen = layouts.choose("mixtral-plain", f"{words} rows8 layers2")
    each, least = 8 // chosen.degrees.dp, chosen.degrees.pp
    micro_batch = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if each // n >= least]), label="rows a microbatch")
    for answer in ranks.run(chosen.degrees.world_size, logged, chosen, micro_batch):
        for row, wanted in zip(answer, logged_alone(), strict=True):
            assert row.keys() == wanted.keys()
            for key, value in row.items():
                assert value == pytest.approx(wanted[key], rel=1e-9, abs=1e-9), key
