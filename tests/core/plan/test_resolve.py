"""The one check of a layout: what it refuses before a process starts, and that what it names instead does work."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.harness import layouts
from zoo.cli.main import main
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import BlockShape
from zoo.core.errors import FitError, LayoutError, UsageError
from zoo.core.job.flags import FLAGS
from zoo.core.job.job import Job
from zoo.core.job.written import parse_assignments
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import AXES, Degrees
from zoo.core.model.inventory import block_shapes, meta_model, model_facts
from zoo.core.plan.memory import state_bytes
from zoo.core.plan.prepare import elsewhere
from zoo.core.plan.resolve import parts_whole
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.plugins.parallel.pipeline.adapter import PipelineParallel
from zoo.testing import ranks

REGISTRY = Registry(Plugins.load())
ANY = Machine()
KEYS = {f"--{flag.name}": flag.key for flag in FLAGS}


@cache
def known(family, size, seq):
    return elsewhere(Job().replace("model", name=family, size=size).replace("data", seq=seq), REGISTRY, ANY)


def typed(job, words):
    """The job with flags typed, as `--tp 2 --set layout.reshard=true no --pp-virtual`."""
    words = words.split()
    while words:
        word = words.pop(0)
        if word == "no":
            key, value = KEYS[words.pop(0)], None
        elif word == "--set":
            ((key, (value, _)),) = parse_assignments((words.pop(0),)).items()
        else:
            key, value = KEYS[word], words.pop(0)
        plain = {f"{s}.{k}": (v, "") for s, part in job.settings().items() for k, v in part.items()}
        job = Job.from_settings(plain, {key: (value, word)})
    return job


def refusal(family, words, machine=ANY, *, size="tiny", seq=1024):
    """The reason, and what is said to work; each of these is tried."""
    job, case = known(family, size, seq)
    job, case = typed(job, words), case.on(machine)
    with pytest.raises((LayoutError, FitError)) as caught:
        case.resolve(job)
    reason, _, hint = str(caught.value).partition("; nearest that works: ")
    assert "\n" not in reason
    found = hint.split(" or ") if hint else []
    for way in found:
        case.check(typed(job, way))
    return reason, found


EIGHT = Machine(ranks=8, said="--nproc says")


@pytest.mark.parametrize(
    ("family", "words", "machine", "reason", "nearest"),
    [
        ("llama3", "--tp 3", ANY, "--tp 3 does not divide the 4 query heads", ["--tp 1", "--tp 2"]),
        ("llama3", "--ep 2", ANY, "--ep 2 deals out experts and llama3 has none", ["--ep 1"]),
        ("llama3", "--cp 2 --seq 1", ANY, "--seq 1 cannot be shared out", ["--seq 2", "--cp 1"]),
        ("llama3", "--pp 3", ANY, "llama3 has 2 blocks", ["--pp 1", "--pp 2"]),
        ("llama3", "--pp 2 --pp-schedule interleaved", ANY, "= 4 stages", ["--pp-schedule 1f1b"]),
        ("llama3", "--pp 2 --global-batch 1", ANY, "at least 2 microbatches", ["--global-batch 2", "--pp 1"]),
        ("llama3", "--pp 2 --cp 3", ANY, "--seq 1024 is no multiple of --cp 3", ["--cp 2", "--cp 4"]),
        ("llama3", "--cp-scheme ring", ANY, "--cp-scheme ring says", ["--cp 2", "--cp-scheme auto"]),
        (
            "llama3",
            "--set layout.cp_wire=bfloat16",
            ANY,
            "layout.cp_wire=bfloat16 says",
            ["--set layout.cp_wire=null", "--cp 2"],
        ),
        ("llama3", "--pp-virtual 2", ANY, "--pp-virtual 2 says", ["no --pp-virtual"]),
        ("llama3", "--pp-schedule gpipe", ANY, "--pp-schedule gpipe says", ["--pp 2", "--pp-schedule 1f1b"]),
        (
            "llama3",
            "--set layout.sequence_parallel=false",
            ANY,
            "layout.sequence_parallel=false says",
            ["--set layout.sequence_parallel=true", "--tp 2"],
        ),
        (
            "llama3",
            "--dp-shard 2 --data-parallel zero1 --set layout.reshard=false",
            ANY,
            "--data-parallel zero1 keeps weights",
            ["--data-parallel auto", "--set layout.reshard=true"],
        ),
        (
            "llama3",
            "--dp-shard 2 --data-parallel ddp --set layout.prefetch=3",
            ANY,
            "--data-parallel ddp gathers no weights",
            ["--data-parallel auto", "--set layout.prefetch=1"],
        ),
        ("llama3", "--cp 4 --cp-scheme hybrid:3", ANY, "1, 2 or 4, not 3", ["--cp 3", "--cp-scheme auto"]),
        ("llama3", "--dp-shard 2 --global-batch 3", ANY, "2 data-parallel ranks", ["--global-batch 4", "--dp-shard 3"]),
        ("llama3", "--cp 3", EIGHT, "needs a multiple of 3 ranks and --nproc says 8", ["--cp 2", "--cp 4"]),
        ("llama3", "--cp 2 --dp-shard 2", EIGHT, "needs 4 ranks and --nproc says 8", ["--cp 4", "--dp-shard 4"]),
        ("llama3", "--cp 16", Machine(most=8), "16 ranks and this machine has 8 accelerators", ["--cp 7", "--cp 8"]),
        ("llama3", "--pp -1", ANY, "--pp -1: a degree is at least 1", ["--pp 1", "--pp 2"]),
        ("mixtral", "--ep 3 --dp-shard 3", ANY, "--ep 3 does not divide the 8 experts", ["--ep 1"]),
        ("mixtral", "--ep 4 --cp 3 --dp-shard 2", ANY, "--cp 3 = 6 ranks", ["--cp 2", "--cp 4"]),
        (
            "mixtral",
            "--tp 2 --set layout.sequence_parallel=false",
            ANY,
            "a token to its experts 2 times",
            ["--set layout.sequence_parallel=true"],
        ),
        ("nemotron-nas", "--pp 6", ANY, "leaves rank 1 of the pipeline without any 'attention'", ["--pp 2", "--pp 3"]),
        (
            "llama3",
            "--tp 8 --ep 4 --cp-scheme ring",
            ANY,
            "--cp-scheme ring says",
            ["--tp 1 --ep 1 --cp-scheme auto", "--tp 2 --ep 1 --cp-scheme auto"],
        ),
        (
            "llama3",
            "--dp-shard 500",
            Machine(memory=16 * 10**9, shared=True),
            "500 processes on this machine",
            ["no --dp-shard", "--dp-shard 64"],
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest_that_can(family, words, machine, reason, nearest):
    said, found = refusal(family, words, machine)
    assert reason in said
    assert sorted(found) == sorted(nearest)


few = st.sampled_from([None, None, 1, 2, 3, 4, 6])


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(REGISTRY.models.names()),
    degrees=st.fixed_dictionaries({axis: few for axis in (*AXES, "ep")}),
    more=st.sampled_from(["", "", "--global-batch 6", "--cp-scheme ring", "--pp-schedule zbv", "--pp-virtual 2"]),
    machine=st.sampled_from([ANY, EIGHT, Machine(most=4)]),
)
def test_what_is_said_to_work_works_and_no_smaller_change_does(family, degrees, more, machine):
    job, case = known(family, "tiny", 96)
    job, case = typed(job, more).replace("layout", **degrees), case.on(machine)
    try:
        case.check(job)
    except LayoutError:
        pass
    else:
        return
    text = " ".join(f"--{axis.replace('_', '-')} {n}" for axis, n in degrees.items() if n is not None)
    _, found = refusal(family, f"{text} {more}", machine, seq=96)
    changes = {len(re.findall(r"--set|--(?!set)[a-z-]+", way)) for way in found}
    assert len(changes) <= 1
    if not found or changes > {1}:
        # One degree alone, tried by hand, does not help.
        for axis in (*AXES, "ep"):
            for degree in range(1, 9):
                with pytest.raises((LayoutError, FitError)):
                    case.check(job.replace("layout", **{axis: degree}))


@pytest.mark.parametrize("model", ["nemotron-nas", "llama", "mixtral"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_a_pipeline_that_leaves_a_rank_without_a_seam_is_refused_and_no_other(model, pp):
    spec, config = layouts.MODELS[model][0], layouts.config(model, 4)
    layout = Layout(degrees=Degrees(pp=pp), seq=16, microbatches=pp, model=model_facts(model, spec, config))
    said, failed = PipelineParallel().check(layout), []
    for rank in range(pp):
        mesh = SimpleNamespace(rank=lambda _axis, rank=rank: rank, size=lambda _axis: pp)
        with torch.device("meta"):
            built = spec.build(config)
        try:
            PipelineParallel().apply(built, spec.plan(config), mesh, layout)
        except UsageError:
            failed.append(rank)
    assert (said is None) == (not failed)
    assert said is None or f"leaves rank {failed[0]} of" in said


def test_what_a_block_is_said_to_be():
    spec, config = layouts.NAS, layouts.config("nemotron-nas")
    blocks, last = block_shapes(meta_model(spec, config), spec.plan(config))
    assert blocks[1] == BlockShape(matrix_values=16 * 16 + 3 * 16 * 8, seams=frozenset({"mlp"}))
    assert last == layouts.VOCAB * 16


def held(chosen):
    """On a rank: bytes of weights, gradients and moments, as they are after a step."""
    run = layouts.Run(chosen)
    sizes = []

    def count(*_):
        for p in run.model.parameters():
            sizes.append(local(p).numel() * p.element_size() + local(p.grad).numel() * p.grad.element_size())

    run.state.optimizer.register_step_pre_hook(count)
    run.step()
    moments = (s[name] for s in run.state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return sum(sizes) + sum(local(m).numel() * m.element_size() for m in moments)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama", "dp_shard2 tp2"),
        ("mixtral", "dp_shard2 cp2 ep2"),
        ("llama", "dp_replicate2 dp_shard2 ddp"),
        ("llama", "pp2 dp_shard2 zero1"),
    ],
)
def test_the_state_of_a_rank_is_what_is_said_of_it(model, words):
    """But for weights as they are computed with, which are gone again, and gradients that stayed whole before."""
    chosen = layouts.choose(model, f"{words} bf16")
    found = ranks.run(4, held, chosen)
    spec, config = layouts.MODELS[model][0], chosen.config
    assert sum(chosen.layout.model.values.total) == sum(p.numel() for p in meta_model(spec, config).parameters())
    whole = parts_whole(chosen.layout, chosen.adapters) - {"weights", "gradients" if "zero1" in words else ""}
    said = state_bytes(chosen.layout, whole)
    # The head is cheap beside blocks of so few tokens, so stages are not equal.
    slack = 0.2 if "pp" in words else 0.02
    assert sum(found) / 4 == pytest.approx(said, rel=0.02)
    assert max(found) == pytest.approx(said, rel=slack)


def test_state_that_cannot_fit_ends_with_3_and_says_how_much_it_is(capsys, monkeypatch):
    """Ranks that share the memory hold all of the state however they cut it, so no other layout is looked for."""
    monkeypatch.setattr("zoo.core.machine.resources.memory_bytes", lambda: 10**12)
    monkeypatch.setattr("zoo.core.plan.resolve.nearest", lambda *_: pytest.fail("was looked for"))
    status = main(["plan", "llama3", "--size", "70b", "--from", "scratch", "--data", "stdlib", "--dtype", "bfloat16"])
    said = capsys.readouterr().err
    assert status == 3
    assert "llama3 has 70.55B parameters, whose weights, gradients and optimizer state take 1.13 TB" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("choice", [("zero1", "a rank of dp_shard 8 (zero1)"), ("ddp", "a rank of dp_shard 8 (ddp)")])
def test_memory_is_checked_as_the_adapter_cuts_it(choice):
    machine = Machine(ranks=8, memory=40 * 10**9)
    job, case = known("llama3", "8b", 8192)
    case.on(machine).check(job)
    reason, found = refusal("llama3", f"--data-parallel {choice[0]} --global-batch 16", machine, size="8b", seq=8192)
    assert choice[1] in reason
    assert "--data-parallel auto" in found
