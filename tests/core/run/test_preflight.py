"""What `finetune` refuses before its first step, `plan` refuses in the same words, and nothing was started."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import zoo
import zoo.models.llama3
from zoo.cli.main import main

TINY = Path(zoo.models.llama3.__file__).parent / "tiny"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, and the data it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data.txt").write_text("some words to be read, again and again. " * 40)
    how = ("--data", folder / "data.txt", "--seq", "64", "--steps", "1", "--out", folder / "run")
    assert main([str(word) for word in ("finetune", "llama3", *how)]) == 0
    return folder


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_tokens(folder, *contents, first=2048):
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": first + i, "content": content, **flags} for i, content in enumerate(contents)]
    edit(file, added_tokens=[*tokenizer["added_tokens"], *added])


def refused(capsys, status, *command):
    """The one line that `plan` and `finetune` refuse a job with."""
    lines = []
    for name in ("plan", "finetune"):
        capsys.readouterr()
        assert main([name, "llama3", *map(str, command)]) == status, capsys.readouterr()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.out == ""
        (line,) = (line for line in said.err.splitlines() if line.startswith("Error"))
        lines.append(line)
    assert lines[0] == lines[1]
    return lines[0]


def test_a_tokenizer_larger_than_the_model(model, tmp_path, capsys):
    add_tokens(model, "<|pad|>", "<|more|>")
    line = refused(capsys, 2, "--from", model, "--data", __file__, "--seq", "64", "--out", tmp_path / "run")
    assert "2050 tokens and the model only 2048 ('<|pad|>' is 2048, '<|more|>' is 2049)" in line
    assert "resize_token_embeddings(2050)" in line
    assert not (tmp_path / "run").exists()
    for command in ("check", "preview"):
        assert main(["data", command, "--from", str(model), __file__]) == 2
        assert "2050 tokens and the model only 2048" in capsys.readouterr().err


def test_a_tokenizer_that_fits_because_the_model_has_rows_to_spare(model, tmp_path, capsys):
    tensors = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = (
        tensors[name]
        .new_zeros(2112, 128)
        .index_copy(0, tensors[name].new_ones(2048).cumsum(0).long() - 1, tensors[name])
    )
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", vocab_size=2112)
    add_tokens(model, "<|pad|>")
    how = ("--from", model, "--data", __file__, "--seq", "64", "--steps", "1", "--out", tmp_path / "run")
    assert main([str(word) for word in ("plan", "llama3", *how)]) == 0
    assert main([str(word) for word in ("finetune", "llama3", *how)]) == 0
    assert main(["data", "check", "--from", str(model), __file__, "--json"]) == 0


def no_template(folder):
    return 5, ["--chat-template", folder / "nowhere.jinja"], ["nowhere.jinja cannot be read", "--chat-template FILE"]


def broken_template(folder):
    (folder / "broken.jinja").write_text("{% for m in messages %}{{ m.content }")
    return 5, ["--chat-template", folder / "broken.jinja"], ["broken.jinja: the chat template does not parse at line 1"]


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    return 5, [], ["tokenizer.json is not a tokenizer"]


def unknown_format(_folder):
    return 2, ["--data-format", "massages"], ["massages", "did you mean 'messages'"]


def no_such_run(_folder):
    return 2, ["--resume", "nowhere"], ["nowhere", "neither a run nor a checkpoint"]


def lost_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return 5, [], ["lacks model.norm.weight"]


def other_shape(folder):
    return 5, ["--set", "model.intermediate_size=512"], ["[256, 128] and not [512, 128]"]


def other_columns(folder):
    (folder / "d.jsonl").write_text('{"txet": "a"}\n')
    return 5, ["--data", folder / "d.jsonl"], ["d.jsonl:1", "columns (txet) fit no data format"]


def refusing_template(folder):
    (folder / "d.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    (folder / "t.jinja").write_text("{{ raise_exception('a user first') }}")
    return 5, ["--data", folder / "d.jsonl", "--chat-template", folder / "t.jinja"], ["d.jsonl:1", "a user first"]


def no_samples(folder):
    (folder / "d.jsonl").write_text("\n")
    return 5, ["--data", folder / "d.jsonl"], ["d.jsonl"]


WRONG = [other_columns, refusing_template, no_samples]


def another_size(_model):
    return 2, ["--size", "8b"], ["--size 8b is not what", "its hidden_size is ", "and 4096 of 8b. Leave out --size"]


def no_size(_model):
    return 2, ["--size", "8bn"], ["--size 8bn is not what", "llama3 has no such size. Leave out --size"]


WRONG += [another_size, no_size]
WRONG += [no_template, broken_template, broken_tokenizer, unknown_format, no_such_run, lost_tensor, other_shape]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_run_cannot_open(wrong, model, tmp_path, capsys):
    status, more, words = wrong(model)
    how = ("--from", model, "--data", __file__, "--seq", "64", "--out", tmp_path / "run", *more)
    line = refused(capsys, status, *how)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (["--seq", "32"], 2, ["was trained with seq 64 and this job has 32", "--seq 64"]),
        (["--global-batch", "2"], 2, ["was trained with global_batch 1", "--global-batch 1"]),
        (["--overlong", "drop"], 5, ["overlong was by format, is drop"]),
        (["--data", __file__], 5, ["corpus was"]),
        (["--resume", "never"], 2, ["holds checkpoints and --resume never"]),
        (
            ["--from", "scratch", "--size", "tiny", "--set", "model.intermediate_size=512"],
            2,
            ["began from the weights of its size", "leave out --from"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_run_that_cannot_go_on(trained, change, status, words, capsys):
    how = ("--data", trained / "data.txt", "--seq", "64", "--steps", "2", "--out", trained / "run", *change)
    line = refused(capsys, status, *how)
    assert all(word in line for word in words), line


def test_a_checkpoint_that_another_process_writes_is_not_called_damaged(trained, tmp_path, capsys):
    """It comes and goes while it is looked at; what is wrong is that two would train in one folder."""
    run = shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    (run / "checkpoints" / "step-1" / "state" / ".metadata").unlink()
    how = ("--data", trained / "data.txt", "--seq", "64", "--steps", "2", "--out", run)
    assert "is damaged" in refused(capsys, 5, *how)
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being trained by another process" in refused(capsys, 2, *how)


def test_a_run_that_is_done_says_so_whatever_became_of_its_data(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    how = ("--data", __file__, "--seq", "64", "--steps", "1", "--out", run)
    assert main([str(word) for word in ("finetune", "llama3", *how)]) == 0
    assert "all 1 steps already" in capsys.readouterr().err


def test_a_layout_is_drawn_without_a_tokenizer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zoo.core.plan.prepared.Tokenizer.from_directory", lambda *_, **__: pytest.fail("was loaded"))
    assert main(["plan", "llama3", "--size", "70b", "--layout-only", "--tp", "2", "--dp-shard", "4"]) == 0
    assert main(["plan", "llama3", "--size", "8b", "--layout-only", "--layout", "auto", "--seq", "8k"]) == 0
