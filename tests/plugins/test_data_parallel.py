"""How weights live over data-parallel ranks: what is refused, what travels how often, what is held, in which type."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import layouts
from zoo.cli.main import main
from zoo.core.contracts.layout import Layout
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.plugins.parallel.data_parallel.ddp import ReplicatedData
from zoo.plugins.parallel.data_parallel.fsdp import FullyShardedData
from zoo.plugins.parallel.data_parallel.zero1 import ShardedOptimizer
from zoo.testing import CollectiveCounter, ranks

EVERY = (FullyShardedData(), ReplicatedData(), ShardedOptimizer())
NAMES = ("fsdp", "ddp", "zero1")
WITHOUT = [word for name in NAMES for word in ("--no-plugin", name)]


def plan(*args):
    return main([*args[:-1], "plan", "llama3", *args[-1]])


@pytest.mark.parametrize(
    ("blocked", "args", "words"),
    [
        ((), ("--data-parallel", "zero"), ["--data-parallel zero", "ddp, fsdp, zero1", "did you mean 'zero1'"]),
        ((), ("--data-parallel", "context"), ["--data-parallel context", "ddp, fsdp, zero1"]),
        ((), ("--set", "layout.reshard=maybe"), ["layout.reshard", "'maybe'", "true or false"]),
        (WITHOUT, ("--dp-replicate", "2"), ["--dp-replicate 2", "no plugin here serves"]),
        (WITHOUT, ("--cp", "2"), ["'dp_shard'", "add up their gradients"]),
        (("--no-plugin", "context"), ("--cp", "2"), ["--cp 2", "no plugin here serves the axis 'cp'"]),
    ],
)
def test_what_nobody_serves_is_refused(blocked, args, words, capsys):
    assert main([*blocked, "plan", "llama3", *args]) in (2, 4)
    said = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("blocked", "args", "chosen"),
    [
        ((), (), "fsdp"),
        (("--no-plugin", "fsdp"), (), "ddp"),
        ((), ("--data-parallel", "zero1"), "zero1"),
        ((), ("--set", "layout.data_parallel=ddp"), "ddp"),
    ],
)
def test_one_is_chosen_and_the_job_says_which(blocked, args, chosen, capsys):
    assert main([*blocked, "plan", "llama3", "--dp-replicate", "2", "--cp", "2", *args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["job"]["layout"]["data_parallel"] == chosen
    assert chosen in told["notes"]["layout"]


def test_exactly_the_chosen_one_applies_and_on_one_rank_only_to_cast():
    for name in NAMES:
        plain = Layout(seq=8, settings=LayoutSection(data_parallel=name))
        assert [a.name for a in EVERY if a.applies(plain)] == []
        assert [a.name for a in EVERY if a.applies(replace(plain, dtype="bfloat16"))] == [name]
        for axis in ("dp_replicate", "dp_shard", "cp"):
            assert [a.name for a in EVERY if a.applies(replace(plain, degrees=Degrees(**{axis: 2})))] == [name]


# On ranks -----------------------------------------------------------------------------------------

KINDS = GATHER, REDUCE, SUM = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
UNITS = 2 * 2 + 1
"""Of the small Mixtral: blocks, their experts, the root."""
NORM = 1
"""All of its weights are cut alike."""


class Collectives(TorchDispatchMode):
    """Counts what is sent, by kind."""

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in KINDS:
            self.counts[kind] += str(func).startswith(f"c10d.{kind}")
        return func(*args, **(kwargs or {}))


def traffic(chosen, micro_batch):
    """On a rank: how many gathers, reduce-scatters and all-reduces the forwards and backwards of a step make."""
    run = layouts.Run(chosen)
    run.update(micro_batch)
    with Collectives() as seen:
        run.update(micro_batch)
    return seen.counts


@pytest.mark.dist
@pytest.mark.parametrize(
    ("words", "per_step", "per_microbatch"),
    [
        ("dp_shard2 zero1", {GATHER: UNITS, REDUCE: UNITS, SUM: NORM}, {}),
        ("dp_shard2 zero1 recompute", {GATHER: UNITS, REDUCE: UNITS, SUM: NORM}, {}),
        ("dp_shard2 ddp", {SUM: UNITS}, {}),
        ("dp_shard2 keep", {SUM: NORM}, {GATHER: UNITS, REDUCE: UNITS}),
        # The root keeps its weights from forward to backward anyhow.
        ("dp_shard2", {SUM: NORM}, {GATHER: 2 * UNITS - 1, REDUCE: UNITS}),
        ("dp_replicate2 dp_shard2", {SUM: UNITS + NORM}, {GATHER: 2 * UNITS - 1, REDUCE: UNITS}),
    ],
)
def test_messages_of_a_step(words, per_step, per_microbatch):
    chosen = layouts.choose("mixtral-plain", words)
    for microbatches in (1, 2):
        found = ranks.run(chosen.degrees.world_size, traffic, chosen, 2 // microbatches)[0]
        for kind, number in found.items():
            assert number == per_step.get(kind, 0) + microbatches * per_microbatch.get(kind, 0), (kind, microbatches)


def held(chosen):
    """On a rank: numbers of weights, gradients and moments kept after two microbatches, names, and types."""
    run = layouts.Run(chosen)
    kept = {}

    def count(*_):
        kept["weights"] = sum(p.to_local().numel() for p in run.model.parameters())
        kept["gradients"] = sum(p.grad.to_local().numel() for p in run.model.parameters())

    run.state.optimizer.register_step_pre_hook(count)
    run.update()
    kept["moments"] = sum(s["exp_avg"].to_local().numel() for s in run.state.optimizer.state.values())
    types = {p.dtype for p in run.model.parameters()} | {s["exp_avg"].dtype for s in run.state.optimizer.state.values()}
    return kept, [name for name, _ in run.model.named_parameters()], types


@pytest.mark.dist
def test_what_a_rank_holds_and_under_which_names():
    whole = sum(p.numel() for p in layouts.source("mixtral-plain").parameters())
    names = [name for name, _ in layouts.source("mixtral-plain").named_parameters()]
    for words, ranks_over in (("dp_shard2 cp2 zero1", 4), ("dp_replicate2 dp_shard2", 2), ("dp_shard2 cp2 ddp", 1)):
        answers = ranks.run(4, held, layouts.choose("mixtral-plain", words))
        for kind in ("weights", "gradients", "moments"):
            sizes = [answer[0][kind] for answer in answers]
            assert sum(sizes) == whole * 4 // ranks_over, (words, kind)
            assert max(sizes) < 1.2 * whole / ranks_over
        assert all(answer[1] == names for answer in answers)


def in_bfloat16(chosen):
    """On a rank: numbers and gradients of a step of four microbatches in bfloat16, and types of what is kept."""
    run = layouts.Run(chosen)
    gradients = run.gradients()
    numbers = {name: value.float() for name, value in run.step().items()}
    types = {p.dtype for p in run.model.parameters()} | {s["exp_avg"].dtype for s in run.state.optimizer.state.values()}
    return numbers, gradients, types


@pytest.mark.dist
def test_bfloat16_arithmetic_over_float32_weights_whatever_holds_them():
    run = layouts.Run(layouts.choose("mixtral-plain", "rows8"))
    exact = run.gradients()
    wanted = run.step()
    every = {name: layouts.choose("mixtral-plain", f"dp_replicate2 dp_shard2 rows8 bf16 {name}") for name in NAMES}
    results = {name: ranks.run(4, in_bfloat16, chosen)[0] for name, chosen in every.items()}
    for name, (numbers, gradients, types) in results.items():
        assert types == {torch.float32}, name
        for key, value in numbers.items():
            torch.testing.assert_close(value, wanted[key].float(), rtol=2e-2, atol=2e-2)
        for key, value in gradients.items():
            # Sums are of float32: all three differ among each other by far less than bfloat16 rounds.
            torch.testing.assert_close(value, results["fsdp"][1][key], rtol=1e-4, atol=1e-6)
            assert (value - exact[key]).norm() < 0.2 * exact[key].norm(), (name, key)


# How far ahead weights are gathered ---------------------------------------------------------------


def gathers_before_the_first_block(chosen):
    """On a rank: how often weights were gathered in a step when its first block begins to compute."""
    run, seen = layouts.Run(chosen), []
    with CollectiveCounter() as wire:
        run.model.model.layers["0"].self_attn.register_forward_pre_hook(lambda *_: seen.append(gathers(wire)))
        run.step()
    return seen[0]


def gathers(wire):
    return sum(total.messages for (kind, _), total in wire.totals.items() if kind == "all_gather")


@pytest.mark.dist
def test_weights_are_gathered_as_many_blocks_ahead_as_was_asked_for():
    found = [
        ranks.run(2, gathers_before_the_first_block, layouts.choose("llama", f"dp_shard2 layers4 {word}"))
        for word in ("prefetch1", "prefetch2", "prefetch3")
    ]
    (plain, _), *_ = found
    assert found == [[plain] * 2, [plain + 2] * 2, [plain + 3] * 2]


@pytest.mark.dist
@pytest.mark.parametrize(("model", "words"), [("llama", "dp_shard2 layers4"), ("mixtral", "dp_shard2 ep2 layers4")])
def test_numbers_do_not_depend_on_how_far_ahead_weights_are_gathered(model, words):
    layouts.check([model], f"{words} prefetch3")


def test_no_blocks_ahead_is_refused(capsys):
    assert main(["plan", "llama3", "--dp-shard", "2", "--set", "layout.prefetch=0"]) == 2
    assert "layout.prefetch" in capsys.readouterr().err
