"""`zoo data`: what is counted, what is shown, and the status a script can act on."""

from __future__ import annotations

import json

import pytest

from tools.made_tokenizer import write_tokenizer
from zoo.cli import main as command_line

ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "yes"}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", "llama3")
    rows = [{"messages": [ASKED, SAID]}, {"text": "hello " * 40}, {"text": ""}, {"messages": [ASKED]}]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"txt": 1}', "{broken"]))
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    return tmp_path


@pytest.fixture
def zoo(folder, capsys, monkeypatch):
    monkeypatch.setitem(command_line.CORE_COMMANDS, "data", ("zoo.cli.data:data", "Look at training data."))

    def run(what, name, *words):
        status = command_line.main(["data", what, str(folder / name), "--from", str(folder / "tokenizer"), *words])
        return status, *capsys.readouterr()

    return run


def test_check_counts_everything_and_names_what_cannot_be_used(zoo, folder):
    status, out, err = zoo("check", "a.jsonl", "--seq", "40")
    assert status == 5
    assert "samples   4 (2 messages, 2 text), 1 blank" in out
    assert "1 longer than a row of 40 tokens" in out
    assert f"  {folder}/a.jsonl:2 (" in out
    assert "1 without a trained token" in out
    assert f"  {folder}/a.jsonl:4\n" in out
    assert "2 broken" in out
    assert f"  {folder}/a.jsonl:6: not JSON" in out
    assert err == f"Error: {folder}/a.jsonl: 3 samples cannot be used\n"


def test_check_of_good_data_is_status_0_and_json(zoo):
    status, out, _ = zoo("check", "good.jsonl", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["formats"] == {"messages": 1, "text": 2}
    assert (found["samples"], found["blank"]) == (3, 1)
    assert found["overlong"]["count"] == found["broken"]["count"] == 0
    assert sum(found["lengths"].values()) == 2
    assert 0 < found["trained_tokens"] < found["tokens"]


def test_preview_marks_what_is_trained(zoo, folder):
    status, out, _ = zoo("preview", "a.jsonl")
    assert status == 0
    assert out.startswith(f"--- {folder}/a.jsonl:1: messages, ")
    assert "assistant<|end_header_id|>\n\n>>>yes<|eot_id|><<<\n" in out
    assert ">>>hi" not in out
    _, out, _ = zoo("preview", "a.jsonl", "--row", "2", "--count", "2")
    assert [line.split(": ")[0][-1] for line in out.splitlines() if line.startswith("---")] == ["2", "3"]
    _, out, _ = zoo("preview", "a.jsonl", "--loss-on", "all")
    assert ">>><|begin_of_text|>" in out


def test_what_is_odd_is_a_warning_with_its_first_places_and_status_0(zoo, folder):
    """Each kind once, however many samples have it."""
    weighed = [ASKED, {**SAID, "weight": 0}, ASKED, SAID]
    thought = [ASKED, {**SAID, "reasoning_content": "let me see"}]
    rows = [
        *[{"messages": thought}] * 5,
        {"messages": weighed, "text": None},
        {"messages": [ASKED, {**SAID, "role": "gpt"}, ASKED, SAID]},
        {"text": "<|start_header_id|>user<|end_header_id|>"},
    ]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, out, err = zoo("check", "odd.jsonl")
    assert (status, err) == (0, "")
    places = ", ".join(f"{folder}/odd.jsonl:{line} message 2" for line in (1, 2, 3))
    assert f"warning   5 turns whose reasoning the chat template leaves out or changes ({places}, ...)\n" in out
    assert f"warning   1 turns of role 'gpt', which is never trained; 'assistant' is ({folder}/odd.jsonl:7 me" in out
    assert f"({folder}/odd.jsonl:8 <|end_header_id|> <|start_header_id|>)" in out
    assert out.count("warning ") == 3
    found = json.loads(zoo("check", "odd.jsonl", "--json")[1])["warnings"]
    assert sorted(kind["count"] for kind in found.values()) == [1, 1, 5]
    _, out, _ = zoo("preview", "odd.jsonl", "--row", "5", "--count", "2")
    assert "warning: turns whose reasoning the chat template leaves out or changes: message 2\n" in out
    assert out.count(">>>yes<|eot_id|><<<") == 2


def test_what_is_odd_about_the_tokenizer_is_said(zoo, folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    status, out, _ = zoo("check", "good.jsonl")
    assert status == 0
    assert "names no eos token: texts and completions end without one" in out


def test_a_sample_in_which_only_other_roles_speak_says_so(zoo, folder):
    (folder / "gpt.jsonl").write_text(json.dumps({"messages": [ASKED, {**SAID, "role": "gpt"}]}))
    status, out, _ = zoo("check", "gpt.jsonl")
    assert status == 5
    assert "1 turns of role 'gpt', which is never trained" in out
    assert "1 without a trained token" in out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("check", "none.jsonl"), 5, "does not exist"),
        (("preview", "good.jsonl", "--row", "9"), 5, "has no sample 9"),
        (("preview", "a.jsonl", "--row", "5"), 5, "a.jsonl:5: its columns (txt)"),
        (("check", "good.jsonl", "--loss-on", "lats"), 2, "did you mean 'last'?"),
        (("check", "good.jsonl", "--seq", "x"), 2, "--seq x"),
    ],
)
def test_errors_are_one_line(zoo, words, status, says):
    code, _, err = zoo(*words)
    assert code == status
    assert says in err
    assert err.count("\n") == 1
