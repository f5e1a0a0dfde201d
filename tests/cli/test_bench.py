"""`zoo bench attention`: its table, its JSON, what it refuses, and times of real ranks."""

import importlib.util
import json
from itertools import takewhile

import pytest

from zoo.cli import chart
from zoo.cli.main import main

SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--seq", "1k", "--cp", "2", "--dtype", "float32")


@pytest.fixture
def bench(capsys):
    """A function from words to (status, stdout, stderr)."""

    def run(*words):
        status = main(["bench", "attention", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def rows(out, head):
    """The rows of the table whose header starts with some words, as lists of cells."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[: len(head)] == list(head))
    found = (line.split() for line in lines[start + 1 :])
    return list(takewhile(lambda cells: cells and not cells[0].endswith(":") and cells[1] != "cannot:", found))


def test_the_tables_have_a_row_for_each_scheme(bench):
    status, out, err = bench("llama3", "--size", "8b", "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "32 query, 8 key/value, of 128 numbers, as llama3 8b; bfloat16" in out
    assert "causal: 1 document in a row of 64k tokens" in out
    names = ["allgather", "halo", "hybrid", "ring", "ulysses"]
    work = {row[0]: row for row in rows(out, ("SCHEME", "LAYOUT"))}
    assert sorted(work) == names
    assert work["ring"][1:4] == ["head-tail", "1.00", "1.00"]
    assert work["ulysses"][1] == "contiguous"
    assert [row[0] for row in rows(out, ("SCHEME", "PASS"))] == [name for name in names for _ in range(2)]
    assert "assumed of each rank" in out


def test_json_has_every_figure_at_full_precision(bench):
    status, out, _ = bench("llama3", "--dtype", "bfloat16", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["heads"] == {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    ring, kv = found["schemes"]["ring"], 2 * (65_536 // 8) * 8 * 128 * 2
    assert ring["forward"]["total"] == 0.75 * 8 * 7 * kv
    assert ring["forward"]["bound"] == 7.5 * kv
    flops = 14 * 128 * 32 * (65_536 * 65_537 // 2)
    assert ring["executed_flops"] == ring["minimal_flops"] == flops
    assert ring["largest_over_mean"] == 1
    assert (found["refused"], found["measured"]) == ({}, None)
    assert ring["seconds"] >= ring["compute_seconds"] == pytest.approx(flops / 8 / found["rates"]["flops"])


def test_documents_are_drawn_by_the_seed(bench):
    one, same, other = (
        json.loads(bench("--mask", "documents:1k+window:300", "--seed", seed, "--json")[1]) for seed in ("1", "1", "2")
    )
    assert one == same
    assert one["mask"]["area"] != other["mask"]["area"]
    assert one["schemes"]["ring"]["layout"].startswith("balanced/")
    assert one["schemes"]["ring"]["executed_over_minimal"] == 1


def test_what_a_scheme_refuses_is_a_line_with_the_reason(bench):
    words = ("--heads", "4", "--kv-heads", "2", "--cp", "8", "--cp-scheme", "ulysses,ring,hybrid:3", "--seq", "4k")
    status, out, _ = bench(*words)
    assert status == 0
    assert [row[0] for row in rows(out, ("SCHEME", "LAYOUT"))] == ["ring"]
    assert "\nulysses cannot: " in out
    assert "\nhybrid:3 cannot: " in out
    assert sorted(json.loads(bench(*words, "--json")[1])["refused"]) == ["hybrid:3", "ulysses"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cp-scheme", "rnig"], "did you mean 'ring'"),
        (["--cp-scheme", "ring:2"], "type --cp-scheme ring"),
        (["--mask", "windw:4"], "did you mean 'window'"),
        (["--seq", "many"], "not a number of tokens"),
        (["--seq", "4", "--cp", "8"], "lower --cp to 4"),
        (["--cp", "0"], "--cp"),
        (["llama3", "--size", "8bb"], "did you mean '8b'"),
        (["--size", "8b"], "of which model"),
        (["lama3"], "did you mean 'llama3'"),
        (["--balance", "headtail"], "did you mean 'head-tail'"),
        (["--dtype", "bf16"], "it is one of"),
        (["--attn", "sdp"], "did you mean 'sdpa'"),
        (["--heads", "6", "--kv-heads", "4"], "divisor of 6"),
        (["--ranks", "2"], "type --measure --ranks 2"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(bench, words, says):
    status, out, err = bench(*words)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err


def test_measuring_inside_another_launcher_is_refused(bench, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    status, _, err = bench(*SMALL, "--measure")
    assert status == 2
    assert "run it without torchrun" in err


def test_a_chart_needs_matplotlib(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(
        chart, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name)
    )
    status, out, err = bench("--plot", str(tmp_path / "x.png"))
    assert (status, out) == (2, "")
    assert "pip install 'zoo[plot]'" in err


@pytest.mark.parametrize(("name", "says"), [("x.doc", "type --plot x.png"), ("no/x.png", "make it first")])
def test_a_chart_that_cannot_be_written_is_refused_before_any_work(bench, monkeypatch, tmp_path, name, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chart, "find_spec", lambda _name: True)
    status, out, err = bench("--plot", name)
    assert (status, out) == (2, "")
    assert says in err


def test_a_chart_is_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "chart.png"
    status, out, err = bench(*SMALL, "--plot", str(file))
    assert status == 0
    assert out
    assert err == f"chart in {file}\n"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.dist
def test_real_ranks_are_timed_by_turns(bench):
    words = (*SMALL, "--mask", "documents:200+window:50", "--measure", "--ranks", "2", "--repeats", "2", "--json")
    status, out, err = bench(*words, "--cp-scheme", "ring,ulysses,hybrid:8")
    assert status == 0
    assert "measuring ring, ulysses on 2 ranks, rows of 1k tokens, 2 turns" in err
    measured = json.loads(out)["measured"]
    assert (measured["ranks"], measured["seq"]) == (2, 1024)
    assert list(measured["schemes"]) == ["ring", "ulysses"]
    assert list(measured["refused"]) == ["hybrid:8"]
    for timing in measured["schemes"].values():
        assert len(timing["totals"]) == 2
        assert 0 < timing["total"] <= max(timing["totals"])


@pytest.mark.dist
def test_times_are_a_table_and_long_rows_are_measured_shorter(bench, monkeypatch):
    monkeypatch.setattr("zoo.core.bench.measure.PATIENCE", 1e-9)
    status, out, err = bench("--cp", "2", "--measure", "--ranks", "1", "--repeats", "1", "--cp-scheme", "ring")
    assert status == 0
    assert err == "measuring ring on 1 rank, rows of 1k tokens (64k would take too long or not fit), 1 turn\n"
    (row,) = rows(out, ("SCHEME", "FORWARD"))
    assert row[0] == "ring"
    assert row[-1] == "1.00"
    assert "measured on 1 rank of this machine, a row of 1k tokens, median of 1:" in out


@pytest.mark.dist
def test_what_a_rank_says_is_said_in_one_line(bench, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text(KERNEL)
    words = (*SMALL, "--attn", "bad", "--measure", "--ranks", "1", "--cp-scheme", "ring", "--plugin", str(plugin))
    status, out, err = bench(*words)
    assert (status, out) == (4, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"Error: plugin bad ({plugin}) failed in Bad.forward (bad.py:")
    assert "on rank 0: ArithmeticError: no more numbers. Go without it: another --attn (" in last


KERNEL = """
from zoo import hookimpl
from zoo import AttentionEntry

@hookimpl
def zoo_register_attention():
    return [AttentionEntry(name="bad", target=f"{__name__}:Bad")]

class Bad:
    name = "bad"

    def supports(self, problem):
        return None

    def forward(self, *arguments):
        raise ArithmeticError("no more numbers")

    backward = forward
"""
