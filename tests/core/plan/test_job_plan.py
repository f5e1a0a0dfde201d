"""What `zoo.plan` returns: plain values, one line as repr, the text and the JSON of `zoo plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import zoo
from zoo.cli.main import main
from zoo.core.plan.job_plan import JobPlan

FLAGS = {"seq": "256", "cp": "2", "dp_shard": "2", "steps": "5", "global_batch": "4"}
WORDS = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def plan():
    return zoo.plan("llama3", traffic=True, **FLAGS)


def test_its_facts_are_attributes(plan):
    assert (plan.model, plan.size, plan.parameters) == ("llama3", "tiny", 557_696)
    assert (plan.seq, plan.rows, plan.steps, plan.dtype) == (256, 4, 5, "float32")
    assert plan.ranks == 4
    assert plan.degrees == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 2, "tp": 1, "ep": 1}
    assert (plan.data_parallel, plan.memory) == ("fsdp", plan.settings["memory"]["policy"])
    assert plan.attention == plan.settings["attention"]["backend"]
    assert plan.context_scheme == plan.settings["layout"]["cp_scheme"]
    assert plan.run == Path(plan.settings["checkpoint"]["out"])
    assert plan.traffic["sent"] == pytest.approx(sum(flow["sent"] for flow in plan.traffic["flows"]))


def test_its_repr_is_one_line(plan):
    assert repr(plan) == "<JobPlan llama3 tiny: 5 steps of 4 rows of 256 tokens on 4 ranks (dp_shard=2 cp=2)>"


@pytest.mark.parametrize("more", [[], ["--traffic"]])
def test_it_is_what_the_command_prints(plan, more, capsys):
    mine = plan if more else dataclasses.replace(plan, traffic=None, traffic_table="")
    assert main(["plan", "llama3", *WORDS, *more]) == 0
    assert capsys.readouterr().out == f"{mine}\n"
    assert main(["plan", "llama3", *WORDS, *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == mine.to_dict()


def plain(value):
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | bool | Path)


def test_no_attribute_leads_to_internals(plan):
    for name in (name for name in dir(plan) if not name.startswith("_")):
        value = getattr(plan, name)
        assert callable(value) or plain(value), name
    assert plain(plan.to_dict())


def test_it_does_not_change(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows = 8


def test_every_attribute_is_documented():
    page = (Path(__file__).parents[3] / "docs" / "launch.md").read_text()
    for field in dataclasses.fields(JobPlan):
        assert f"`{field.name}`" in page, field.name


def test_without_context_parallelism_there_is_no_scheme():
    assert zoo.plan("llama3", seq=256).context_scheme is None
