"""`--layout auto`: over all families and sizes it gives what the check accepts, or says how many devices it takes."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from zoo.cli.main import main
from zoo.core.errors import FitError, LayoutError
from zoo.core.job.job import Job
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import AXES
from zoo.core.plan.auto import with_degrees
from zoo.core.plan.prepare import elsewhere
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

REGISTRY = Registry(Plugins.load())
SIZES = [(family, size) for family in REGISTRY.models.names() for size in REGISTRY.models.get(family).sizes]
GB = 10**9


def nodes(devices, memory=80):
    return Machine(ranks=devices, per_node=min(devices, 8), memory=memory * GB)


@cache
def known(family, size, seq):
    job = Job().replace("model", name=family, size=size).replace("data", seq=seq)
    return elsewhere(job, REGISTRY, nodes(1))


def case_of(family, size, seq, machine):
    job, case = known(family, size, seq)
    return job.replace("layout", degrees="auto"), case.on(machine)


def outcome(job, case):
    """The job and the notes, or the refusal."""
    try:
        return *with_degrees(job, case), ""
    except (FitError, LayoutError) as error:
        return None, None, str(error)


def state_by_hand(parameters, ranks):
    """Weights, gradients and two moments in fp32, cut over all ranks."""
    return 16 * parameters / ranks


@pytest.mark.parametrize("devices", [1, 8, 16, 64, 512])
@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_size_gets_a_layout_or_the_number_of_devices_it_takes(family, size, devices):
    job, case = case_of(family, size, 8192 if size != "tiny" else 1024, nodes(devices))
    parameters = REGISTRY.models.get(family).parameters[size]
    chosen, notes, refused = outcome(job, case)
    if refused:
        least = int(re.search(r"it takes ([\d,]+) of them$", refused)[1].replace(",", ""))
        assert least > devices
        assert f"{parameters / 1e9:.2f}B parameters" in refused
        enough, _ = with_degrees(job, case.on(nodes(least)))
        case.on(nodes(least)).check(enough)
        assert state_by_hand(parameters, least // 2) > 0.5 * 0.9 * 80 * GB
        with pytest.raises(FitError):
            with_degrees(job, case.on(nodes(least // 2)))
        return
    degrees = case.check(chosen).layout.degrees
    assert degrees.world_size == devices
    assert degrees.mapping() == {axis: getattr(chosen.layout, axis) for axis in (*AXES, "ep")}
    assert chosen.layout.degrees is None
    assert state_by_hand(parameters, devices) < 80 * GB
    assert [topic for topic, _ in notes if topic != "ep"] == ["auto", "pp", "tp", "cp", "dp_shard"]


degrees = st.sampled_from([None, None, None, 1, 2, 3, 4, 8])


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    seq=st.sampled_from([1000, 1024, 8192, 131_072, 1 << 20]),
    devices=st.sampled_from([1, 2, 6, 8, 24, 64, 512]),
    said=st.fixed_dictionaries({axis: degrees for axis in (*AXES, "ep")}),
    batch=st.sampled_from([None, None, 1, 6, 64]),
    data_parallel=st.sampled_from(["auto", "zero1", "ddp"]),
)
def test_what_is_chosen_is_never_refused_and_keeps_what_was_given(size, seq, devices, said, batch, data_parallel):
    job, case = case_of(*size, seq, nodes(devices))
    job = job.replace("layout", **said, data_parallel=data_parallel).replace("data", global_batch=batch)
    chosen, notes, refused = outcome(job, case)
    if refused:
        assert re.fullmatch("--layout auto: .*", refused)
        return
    assert case.check(chosen).layout.degrees.world_size == devices
    assert all(getattr(chosen.layout, axis) == degree for axis, degree in said.items() if degree is not None)
    assert with_degrees(job, dataclasses.replace(case)) == (chosen, notes)


def chosen(family, size, seq, machine, **layout):
    job, case = case_of(family, size, seq, machine)
    return with_degrees(job.replace("layout", **layout), case)


def test_a_longer_row_gets_more_ranks_of_cp_and_the_reason_has_the_tokens():
    degrees = [chosen("llama3", "70b", seq, nodes(64))[0].layout.cp for seq in (8192, 65_536, 131_072)]
    assert degrees == sorted(degrees)
    assert degrees[0] == 1 < degrees[1]
    notes = dict(chosen("llama3", "70b", 65_536, nodes(64))[1])
    assert notes["cp"].startswith(f"{degrees[1]}: {65_536 // degrees[1]:,} tokens a rank; with cp ")


def test_gathered_weights_that_do_not_fit_are_cut_over_a_machine():
    layout = chosen("llama3", "3.1-405b", 131_072, nodes(512))[0].layout
    assert (layout.tp, layout.pp) == (8, 1)


def test_experts_stay_on_a_machine():
    layout = chosen("mixtral", "8x7b", 32_768, nodes(64))[0].layout
    assert layout.ep == 8
    assert chosen("mixtral", "8x7b", 32_768, nodes(64), tp=2)[0].layout.ep == 4


@pytest.mark.parametrize(
    ("devices", "layout", "words"),
    [
        (16, {"tp": 3}, ["--tp 3 needs a multiple of 3 ranks", "nearest that works: --tp 2 or --tp 4"]),
        (24, {"tp": 3}, ["--tp 3 does not divide the 32 query heads", "nearest that works: --tp 2 or --tp 4"]),
        (8, {"ep": 2}, ["--ep 2 deals out experts", "nearest that works: no --ep or --ep 1"]),
    ],
)
def test_what_was_given_and_cannot_be_completed_is_refused_with_what_can(devices, layout, words):
    with pytest.raises(LayoutError) as caught:
        chosen("llama3", "8b", 8192, nodes(devices), **layout)
    for word in words:
        assert word in str(caught.value)


def test_a_run_has_the_numbers_that_were_chosen_and_plan_the_reasons(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["finetune", "llama3", "--layout", "auto", "--steps", "1", "--seq", "64", "--out", str(run)]) == 0
    layout = yaml.safe_load((run / "config.yaml").read_text())["layout"]
    assert {axis: layout[axis] for axis in (*AXES, "ep")} == dict.fromkeys((*AXES, "ep"), 1)
    assert "degrees" not in layout
    again = ["plan", "llama3", "-c", str(run / "config.yaml"), "--layout", "auto", "--nproc", "4", "--cp", "2"]
    assert main([*again, "--global-batch", "4"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)
    assert lines["layout"].startswith("dp_shard 2 x cp 2 ")
    assert lines["cp"] == "2: as asked for"
    assert lines["dp_shard"].startswith("2: the rest of 4 ranks")
