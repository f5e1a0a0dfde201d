"""Every layout is the same function: all numbers of three steps equal the single process to 1e-9, in fp64.

Compared on every rank: loss, gradient norm and reports of each step, then weights and both moments of the optimizer.
docs/layouts.md has the same table.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.harness import layouts

pytestmark = pytest.mark.dist

MODELS = ("llama", "llama-tied", "mixtral", "nemotron", "nemotron-nas")
"""Each meets every layout that zoo does not refuse for it, but for the last, which is left out on eight ranks."""
MATRIX = (
    # 1 rank
    "recompute",
    # 2 ranks
    "dp_replicate2",
    "dp_replicate2 zero1",
    "dp_shard2 keep",
    "dp_shard2 ddp",
    "dp_shard2 ep2",
    "cp2",
    "cp2 ddp",
    "cp2 zero1 ep2 recompute",
    "tp2",
    "tp2 no-sp",
    "pp2",
    "pp2 rows3 recompute",
    "pp2 gpipe rows1",
    "pp2 interleaved",
    "pp2 zero-bubble",
    "pp2 zero-bubble virtual2",
    "pp2 zbv",
    "pp2 zbv recompute rows5",
    # 4 ranks
    "dp_replicate2 dp_shard2",
    "dp_replicate2 dp_shard2 ep2 ddp recompute",
    "dp_replicate2 cp2 recompute",
    "dp_replicate2 cp2 ep2 ulysses",
    "dp_shard4",
    "dp_shard4 ep4",
    "dp_shard2 cp2 keep",
    "dp_shard2 cp2 ep2 recompute",
    "dp_shard2 cp2 ep4 zero1",
    "cp4 ddp",
    "tp4",
    "tp4 no-sp",
    "tp2 cp2 recompute",
    "tp2 cp2 no-sp ulysses",
    "tp2 cp2 ep2",
    "tp2 dp_shard2 zero1",
    "tp2 dp_shard2 ddp no-sp",
    "tp2 dp_replicate2 recompute",
    "pp4",
    "pp4 gpipe rows2",
    "pp4 zero-bubble",
    "pp2 cp2 allgather",
    "pp2 cp2 ep2 interleaved",
    "pp2 cp2 zbv recompute",
    "pp2 tp2",
    "pp2 tp2 interleaved no-sp recompute",
    "pp2 dp_shard2 zero-bubble virtual2",
    "pp2 dp_shard2 ddp",
    "pp2 dp_shard2 zero1 interleaved recompute",
    "pp2 dp_shard2 ep2",
    "pp2 dp_replicate2 zbv",
    "pp2 dp_replicate2 interleaved",
    # 8 ranks
    "dp_shard4 cp2 ep8",
    "dp_replicate2 dp_shard2 cp2 zero1",
    "dp_replicate2 dp_shard2 cp2 ep2",
    "dp_replicate2 dp_shard2 cp2 ep4 ddp",
    "tp8",
    "tp2 cp2 dp_shard2 ep4 recompute",
    "tp2 cp2 dp_replicate2 zero1",
    "pp8",
    "pp4 tp2 interleaved",
    "pp2 cp2 tp2",
    "pp2 cp2 tp2 ep2 interleaved",
    "pp2 cp4 seq28 zero-bubble",
    "pp2 dp_shard2 tp2 ep2",
    "pp2 dp_shard2 cp2 interleaved",
    "pp2 dp_shard2 cp2 ep4 zero-bubble",
    "pp2 dp_replicate2 dp_shard2 gpipe",
    "pp2 dp_replicate2 dp_shard2 ep2 interleaved recompute",
)
"""Words as tests/harness/layouts.py takes them, by the number of ranks."""


def verdict(model, words):
    """`yes` if a model runs under a layout, `refused` if it cannot, `-` if it could and is left out."""
    if layouts.refusal(model, words) is not None:
        return "refused"
    return "-" if model == "nemotron-nas" and layouts.choose(model, words).degrees.world_size > 4 else "yes"


def models(words):
    """The models that run under a layout, and where experts are dealt out one whose router leaves some idle."""
    found = [model for model in MODELS if verdict(model, words) == "yes"]
    return found + (["mixtral-biased"] if re.search(r"\bep\d", words) else [])


@pytest.mark.parametrize("words", MATRIX)
def test_every_layout_equals_one_process(words):
    layouts.check(models(words), words)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("mixtral-plain", "dp_shard2 cp2 ep2"),
        ("mixtral-plain", "pp2 cp2 ep2"),
        ("mixtral-plain", "tp2 dp_shard2 ep2"),
        ("mixtral-window", "pp2 cp2 halo"),
        ("mixtral-window", "tp2 cp2 halo"),
        ("llama", "tp2 dp_shard3"),
        ("llama-tied", "tp2 cp3"),
    ],
)
def test_no_auxiliary_loss_a_sliding_window_and_odd_degrees_equal_one_process(model, words):
    layouts.check([model], words)


@pytest.mark.parametrize(
    "words", ["cp4", "tp4", "cp2 tp2 ep2", "dp_shard2 cp2 ep4 recompute", "pp2 tp2 interleaved", "pp2 cp2 ep2"]
)
def test_padding_on_some_ranks_only_equals_one_process(words):
    """The fourth row is 18 tokens of 26: with tp4 the last rank has nothing but padding of it."""
    layouts.check(["mixtral"], f"{words} rows4")


def test_the_biased_router_leaves_experts_empty_and_the_others_uneven():
    result = layouts.wanted(layouts.choose("mixtral-biased"))
    for step in (1, 2, 3):
        load = result[f"{step}.expert_load"]
        assert load[list(layouts.IDLE)].tolist() == [0, 0]
        assert load.sum().item() == pytest.approx(1)
        assert load.max() > 2 * load[load > 0].min()
    for name, value in result.items():
        if name.startswith("exp_avg") and ".experts." in name:
            assert not value[list(layouts.IDLE)].any()
            assert value.any()


def test_single_processes_of_all_models_differ():
    losses = [layouts.wanted(layouts.choose(model))["3.loss"] for model in layouts.MODELS]
    assert len(set(torch.stack(losses).tolist())) == len(losses)
