"""What is logged does not depend on microbatches, their number or ranks; nor on who reads which row; whole commands."""

from __future__ import annotations

import json
import math
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tests.core.run.test_feed import Stream
from tests.harness.pooled_command import train
from tools.layout_cases import MODELS, Case, Corpus, furthest
from zoo.core.contracts.batch import IGNORE, Row
from zoo.core.contracts.layout import Layout
from zoo.core.mesh.degrees import AXES, PEER_AXES, Degrees
from zoo.core.mesh.mesh import Mesh
from zoo.core.run import run as training
from zoo.core.run.feed import Feed, reads_data
from zoo.testing import ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("corpus"))


# Losses -------------------------------------------------------------------------------------------


LAYOUTS = [
    "",
    "--dp-shard 2",
    "--dp-shard 3 --data-parallel zero1",
    "--dp-replicate 2 --data-parallel ddp",
    "--dp-replicate 2 --dp-shard 2",
    "--cp 2",
    "--cp 3",
    "--dp-shard 2 --cp 2",
    "--tp 2",
    "--dp-shard 2 --tp 2",
    "--pp 2 --pp-schedule gpipe",
    "--pp 2 --dp-shard 2 --pp-schedule gpipe",
]
EXPERTS = ["--dp-shard 2 --ep 2", "--dp-shard 2 --cp 2 --ep 4", "--pp 2 --cp 2 --ep 2 --pp-schedule gpipe"]
CASES = [Case(model, layout) for model in ("llama-tied", "mixtral", "nemotron") for layout in LAYOUTS]
CASES += [Case("mixtral", layout) for layout in EXPERTS]
"""Up to four ranks; each with any number of microbatches of any number of rows."""

samples = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=4, max_size=16)
"""Words of prompts, which are not trained, and of completions, which are."""
UNEQUAL = [(59, 1), (0, 40)] * 8


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=st.sampled_from(CASES),
    micro_batch=st.integers(1, 3),
    microbatches=st.integers(1, 3),
    seq=st.integers(24, 64),
    samples=samples,
)
@example(case=Case("llama-tied", "--dp-shard 2"), micro_batch=1, microbatches=1, seq=40, samples=UNEQUAL)
@example(case=Case("nemotron", "--cp 3"), micro_batch=2, microbatches=2, seq=31, samples=UNEQUAL)
@example(case=Case("mixtral", EXPERTS[1]), micro_batch=1, microbatches=2, seq=33, samples=UNEQUAL)
def test_no_logged_number_depends_on_how_a_batch_is_split(
    case, micro_batch, microbatches, seq, samples, corpus, tmp_path
):
    data = tmp_path / f"{next(NUMBERS)}.jsonl"
    lines = [{"prompt": "in " * prompt, "completion": " out" * completion} for prompt, completion in samples]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = case.data_parallel * micro_batch * microbatches
    job = [*corpus.command(case.model, 2, rows, seq=seq), "--data", data]
    # The one term that is a mean over rows takes one row a microbatch, and refuses more.
    job += ["--set", "model.output_router_logits=false"] if case.model == "mixtral" else []
    whole = train(data.with_suffix(".one"), *job, "--set", f"data.micro_batch={rows}")
    parts = train(data.with_suffix(".many"), *job, *case.words, "--set", f"data.micro_batch={micro_batch}")
    assert furthest(parts, whole) < 1e-9


NUMBERS = count()


# Seeds --------------------------------------------------------------------------------------------


class Ragged(Stream):
    """Rows that say their number, each with another number of trained tokens."""

    def take(self, count):
        return [
            Row(
                tokens=row.tokens,
                labels=np.where(np.arange(8) < row.tokens[0] % 8, row.tokens, IGNORE),
                documents=row.documents,
            )
            for row in super().take(count)
        ]


def read(degrees, steps):
    """On a rank: where it stands on each axis, the rows of each step, and how many tokens it takes them to train."""
    degrees = Degrees(**degrees)
    mesh = Mesh(degrees, "cpu")
    feed = Feed(
        Ragged() if reads_data(mesh) else None,
        mesh=mesh,
        adapters=[],
        layout=Layout(seq=8, degrees=degrees, microbatches=8 // degrees.dp, dtype="float64"),
        steps=steps,
    )
    data = [feed.step(torch.device("cpu")) for _ in range(steps)]
    feed.close()
    rows = [[int(batch.tokens[0, 0]) for batch in step.batches] for step in data]
    return {axis: mesh.rank(axis) for axis in AXES}, rows, [step.trained_tokens for step in data]


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 4},
        {"pp": 2, "dp_shard": 2, "tp": 2},
        {"pp": 2, "cp": 2, "tp": 2, "ep": 2},
        {"dp_shard": 4, "tp": 2, "ep": 2},
    ],
    ids=str,
)
def test_peers_have_the_same_rows_and_data_parallel_ranks_share_them_out(degrees):
    answers = ranks.run(math.prod(n for axis, n in degrees.items() if axis != "ep"), read, degrees, 2)
    by_place = {}
    for place, rows, trained in answers:
        mine = by_place.setdefault(tuple(place[axis] for axis in AXES if axis not in PEER_AXES), rows)
        assert rows == mine
        assert trained == [sum(n % 8 for n in range(8 * step, 8 * step + 8)) for step in (0, 1)]
    assert len(by_place) == Degrees(**degrees).dp
    for step in (0, 1):
        shared_out = [row for _, rows in sorted(by_place.items()) for row in rows[step]]
        assert shared_out == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize("model", MODELS)
def test_no_step_draws_a_random_number(model, corpus, tmp_path):
    """There is no dropout, and nothing else whose seed some ranks would have to share and others not."""
    step, drawn = training.train_step, []

    def watched(*args):
        before = torch.get_rng_state()
        result = step(*args)
        drawn.append(not torch.equal(before, torch.get_rng_state()))
        return result

    with mock.patch.object(training, "train_step", watched):
        train(tmp_path / "run", *corpus.command(model, 2, 2))
    assert drawn == [False] * 3
