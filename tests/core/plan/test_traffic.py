"""The account of a job: what `zoo plan --traffic` says, held against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from zoo.cli import main as shell
from zoo.core import api
from zoo.core.contracts.parallel import ParallelAdapter, Phase
from zoo.core.plan import traffic_report
from zoo.core.plan.traffic import sent
from zoo.core.registry.loading import Plugins

JOB = {"data": "README.md", "seq": "256", "size": "tiny", "from_": "scratch", "memory": "none", "dtype": "float32"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def prepared(model, **flags):
    return api.ready(Plugins.load(), model, JOB | flags)


def report_of(model, **flags):
    return traffic_report.report(prepared(model, **flags))


def flows(model="llama3", **flags):
    """By collective, axis and purpose: bytes of the payload, and ranks of the group."""
    report = report_of(model, **flags)
    return {(flow.kind, flow.axis, flow.what): (flow.payload, ranks) for flow, ranks, _ in report.flows}


def test_the_least_that_a_rank_sends_of_a_payload():
    assert sent("all_gather", 4, 800) == sent("reduce_scatter", 4, 800) == sent("broadcast", 4, 800) == 600
    assert sent("all_reduce", 4, 800) == 1200
    assert sent("send", 4, 800) == sent("all_to_all", 4, 800) == 800


def test_one_process_sends_nothing():
    assert flows() == {}


def test_fsdp_gathers_blocks_twice_and_the_root_once():
    """Llama tiny: 2 blocks of 128 x (128 + 64 + 64 + 128 + 3 x 256) + 2 x 128 values; tied root of 2048 x 128 + 128."""
    block, root = 128 * (128 + 64 + 64 + 128 + 3 * 256) + 2 * 128, 2048 * 128 + 128
    found = flows(dp_shard=4, global_batch=8)
    assert found["all_gather", "fsdp", "weights"] == (2 * (2 * 2 * block + root) * 4, 4)
    assert found["reduce_scatter", "fsdp", "gradients"] == (2 * (2 * block + root) * 4, 4)
    assert found["all_reduce", "fsdp", "gradient norm"] == (4, 4)


def test_balanced_routers_send_their_share_elsewhere():
    """Mixtral tiny: 2 blocks of 8 experts, 2 a token; 256 tokens of width 128 a rank, half of whose copies go."""
    found = flows("mixtral", dp_shard=2, ep=2)
    assert found["all_to_all", "ep", "copies of tokens"] == (2 * 2 * (256 + 256) * 128 * 4, 2)
    assert found["all_to_all", "ep", "counts"] == (2 * 4 * 8, 2)


def test_the_rank_that_sends_most_is_shown():
    """Of two stages of one block each the first gathers the embedding, the second the head and a norm more."""
    report = report_of("nemotron", pp=2, dp_shard=2)
    assert report.rank == 2
    assert report.silent == ()


def test_an_adapter_that_says_nothing_is_named():
    class Silent(ParallelAdapter):
        name, axes, phase = "silent", (), Phase.WRAP

    report = traffic_report.report(dataclasses.replace(prepared("llama3", dp_shard=2), adapters=[Silent()]))
    assert (report.silent, report.flows) == (("silent",), ())


def test_the_command_prints_a_table_or_json(capsys):
    words = ["plan", "llama3", "--data", "README.md", "--seq", "256"]
    assert shell.main([*words, "--cp", "2", "--traffic"]) == 0
    shown = capsys.readouterr().out
    assert "sends most" in shown
    assert "K/V or heads" in shown
    assert shell.main([*words, "--cp", "2", "--traffic", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["traffic"]
    assert plain["sent"] == pytest.approx(sum(flow["sent"] for flow in plain["flows"]))
    assert shell.main([*words, "--traffic"]) == 0
    assert "no rank sends anything" in capsys.readouterr().out
