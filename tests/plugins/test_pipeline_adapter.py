"""The `pipeline` adapter: how blocks are dealt out, and what it refuses before a process starts."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.stage import _PipelineStageBase

from tests.harness import layouts
from tests.harness.command import zoo
from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.errors import UsageError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.model.inventory import model_facts
from zoo.models.common.loss import TokenLoss
from zoo.plugins.parallel.pipeline.adapter import PipelineParallel
from zoo.plugins.parallel.pipeline.cut import Partition
from zoo.plugins.parallel.pipeline.stage_model import RepeatableLoss
from zoo.plugins.parallel.pipeline.stages import SCHEDULES, balance, stages_of


def dearest(costs, cuts, first, last):
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
    stages[0] += first
    stages[-1] += last
    return max(stages)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_cut_has_a_cheaper_dearest_stage(seed):
    draw = random.Random(seed)
    costs = [draw.choice([0.0, 1.0, 2.5, 4.0]) for _ in range(draw.randint(1, 9))]
    num_stages = draw.randint(1, len(costs))
    first, last = draw.choice([0.0, 3.0]), draw.choice([0.0, 2.0, 9.0])
    parts = balance(costs, num_stages, first=first, last=last)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == num_stages
    assert all(parts)
    inner = itertools.combinations(range(1, len(costs)), num_stages - 1)
    least = min(dearest(costs, (0, *cuts, len(costs)), first, last) for cuts in inner)
    assert dearest(costs, (0, *(part.stop for part in parts)), first, last) == pytest.approx(least)


def test_the_head_takes_the_place_of_blocks():
    assert [len(part) for part in balance([1.0] * 32, 4)] == [8, 8, 8, 8]
    assert [len(part) for part in balance([1.0] * 30, 4, last=2.0)] == [8, 8, 8, 6]


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 3), ("zbv", 2)])
def test_stages_lie_where_torch_expects_them(schedule, virtual):
    theirs = generate_stage_to_rank_mapping(4, 4 * virtual, style="v" if schedule == "zbv" else "loop")
    settings = LayoutSection(pp_schedule=schedule, pp_virtual=virtual)
    assert {stage: rank for rank in range(4) for stage in stages_of(rank, 4, settings)} == theirs


def request(schedule="1f1b", *, pp=2, virtual=None, microbatches=8, blocks=8, dp_shard=1, cp=1):
    return Layout(
        degrees=Degrees(pp=pp, dp_shard=dp_shard, cp=cp),
        seq=64,
        microbatches=microbatches,
        settings=LayoutSection(pp_schedule=schedule, pp_virtual=virtual),
        model=ModelFacts(name="llama3", config=SimpleNamespace(num_hidden_layers=blocks)),
    )


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (request(), None),
        (request("1f1", pp=2), ["--pp-schedule 1f1", "1f1b, gpipe", "did you mean '1f1b'"]),
        (request(pp=9), ["--pp 9", "8 blocks"]),
        (request("interleaved", pp=8), ["16 stages", "8 blocks"]),
        (request("zbv", pp=3, blocks=3), ["6 stages", "3 blocks"]),
        (request(virtual=2), ["--pp-virtual 2", "exactly 1", "--pp-schedule interleaved"]),
        (request("interleaved", virtual=1), ["--pp-virtual 1", "at least 2"]),
        (request("zbv", virtual=3), ["--pp-virtual 3", "exactly 2"]),
        (request(pp=4, microbatches=3), ["at least 4", "--global-batch 3 makes 3"]),
        (request(pp=4, microbatches=3, dp_shard=2), ["at least 4", "--global-batch 6 makes 3"]),
        (request("interleaved", pp=4, microbatches=9), ["rounds of equal size", "--global-batch 9 makes 9"]),
        (request("interleaved", pp=4, microbatches=10), None),
        (request(cp=3), ["--seq 64", "--cp 3"]),
        (request(cp=4), None),
        (request("gpipe", pp=4, microbatches=1), None),
        (request("zbv", pp=4, microbatches=1), None),
    ],
)
def test_what_a_schedule_cannot_is_refused(layout, words):
    said = PipelineParallel().check(layout)
    assert (said is None) == (words is None), said
    for word in words or ():
        assert word in said


class OneRank:
    """A mesh as one rank of `pp` sees it."""

    def __init__(self, rank, size):
        self.rank = lambda _axis: rank
        self.size = lambda _axis: size


def of_schedule(model, schedule):
    """The layout of a model's four blocks."""
    facts = model_facts(model, layouts.MODELS[model][0], layouts.config(model, 4))
    return Layout(seq=16, settings=LayoutSection(pp_schedule=schedule), model=facts)


def names_of_rank(model, rank, size, schedule):
    spec, config = layouts.MODELS[model][0], layouts.config(model, 4)
    with torch.device("meta"):
        built = spec.build(config)
    layout = of_schedule(model, schedule)
    PipelineParallel().apply(built, spec.plan(config), OneRank(rank, size), layout)
    return {name for name, _ in built.named_parameters()}


@pytest.mark.parametrize(
    ("model", "schedule"), [(m, "1f1b") for m in layouts.MODELS] + [("llama", "zbv"), ("llama-tied", "zbv")]
)
def test_ranks_share_out_all_names_and_only_tied_ones_are_twice(model, schedule):
    held = [names_of_rank(model, rank, 2, schedule) for rank in range(2)]
    assert set.union(*held) == set(dict(layouts.source(model, 4).named_parameters()))
    twice = {"model.embed_tokens.weight"} if layouts.config(model).tie_word_embeddings else set()
    assert set.intersection(*held) == (twice if schedule != "zbv" else set())


def test_a_rank_without_attention_is_refused():
    spec, config = layouts.NAS, layouts.config("nemotron-nas")
    with torch.device("meta"):
        built = spec.build(config)
    layout = of_schedule("nemotron-nas", "1f1b")
    with pytest.raises(UsageError, match="without any 'attention'.*lower --pp"):
        PipelineParallel().apply(built, spec.plan(config), OneRank(1, 4), layout)


def test_attention_weighs_by_the_keys_it_sees():
    spec, config = layouts.LLAMA, layouts.config("llama", 4)

    def sizes(windows):
        with torch.device("meta"):
            built = spec.build(config)
        heads = [HeadShape.of(config)] * len(windows)
        layout = Layout(seq=10**6, model=ModelFacts(layer_heads=heads, layer_windows=windows))
        return [len(stage) for stage in Partition.of(built, spec.plan(config), OneRank(0, 2), layout).blocks]

    assert sizes(()) == [2, 2]
    assert sizes((None, 1, 1, 1)) == [1, 3]


def test_a_loss_may_be_differentiated_in_two_parts():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 6, 4), (9, 4)))
    labels = torch.randint(0, 9, (1, 6))
    wanted = torch.autograd.grad(TokenLoss()(hidden, weight, labels) / 7, (hidden, weight))
    loss = RepeatableLoss(TokenLoss())(hidden, weight, labels) / 7
    found = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in (hidden, weight)]
    torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-12)


def test_a_refusal_is_one_line_of_the_command(tmp_path):
    job = ("llama3", "--data", "stdlib", "--seq", 256, "--out", tmp_path / "run")
    _, err = zoo("finetune", *job, "--pp", 2, "--global-batch", 1, status=2)
    assert "--global-batch 2" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    assert set(SCHEDULES) == {"1f1b", "gpipe", "interleaved", "zero-bubble", "zbv"}


TORCH = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def torch_takes(schedule, pp, per_rank, microbatches):
    """Whether torch's own schedule can be made for the first rank of `pp`."""
    stages = pp * per_rank
    places = {stage: stage % pp for stage in range(stages)}
    mine = [
        MagicMock(
            spec=_PipelineStageBase,
            stage_index=index,
            num_stages=stages,
            group_size=pp,
            group_rank=0,
            is_first=index == 0,
            is_last=False,
            has_backward=True,
            stage_index_to_group_rank=places,
            submod=torch.nn.Identity(),
        )
        for index in stages_of(0, pp, LayoutSection(pp_schedule=schedule, pp_virtual=per_rank))
    ]
    try:
        TORCH[schedule](mine[0] if schedule in ("1f1b", "gpipe") else mine, n_microbatches=microbatches)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_takes_the_microbatches_that_are_not_refused_and_no_others(schedule):
    per_rank = SCHEDULES[schedule].least_virtual
    for pp, microbatches in itertools.product((2, 3, 4), range(1, 13)):
        said = PipelineParallel().check(request(schedule, pp=pp, microbatches=microbatches))
        assert torch_takes(schedule, pp, per_rank, microbatches) == (said is None), (pp, microbatches, said)
