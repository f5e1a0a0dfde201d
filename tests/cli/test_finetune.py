"""Wrong input to `zoo finetune`: one line that names value, rule and what to type, and the right exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import zoo.models.llama3
from tests.harness.command import zoo as run_zoo
from zoo.cli.main import main
from zoo.core.run.metrics import read_metrics

TINY = Path(zoo.models.llama3.__file__).parent / "tiny"


def refused(capsys, *args, status):
    """The one line a command says on stderr when it refuses."""
    assert main(["finetune", *map(str, args)]) == status
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, said.err
    assert "Traceback" not in said.err
    return errors[0]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded checkpoint in two shards, to be damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("llama3", "--seq", "4", "--cp", "7"), 2, ["--seq 4", "--cp 7", "nearest that works: --cp 2 or --cp 4"]),
        (("llama3", "--cp", "8", "--cp-scheme", "ulysses"), 2, ["ulysses", "at most 4 ranks", "--cp-scheme hybrid"]),
        (("llama3", "--cp", "4", "--cp-scheme", "hybrid:3"), 2, ["hybrid:3", "1, 2 or 4, not 3"]),
        (("llama3", "--cp", "4", "--cp-scheme", "ring:3"), 2, ["ring:3", "takes nothing after its name"]),
        (("llama3", "--cp", "4", "--cp-scheme", "a,b,c"), 2, ["a,b,c", "without and with a window"]),
        (("llama3", "--set", "attention.mask=prefixes"), 2, ["attention.mask", "causal, prefix, full", "'prefix'"]),
        (("llama3", "--set", "layout.cp_balance=zigzag"), 2, ["layout.cp_balance", "head-tail"]),
        (
            ("llama3", "--set", "attention.mask=full", "--set", "model.sliding_window=64"),
            2,
            ["attention.mask is full", "sliding window of 64", "leave attention.mask causal"],
        ),
        (("llama3", "--set", "model.attention_dropout=0.1"), 2, ["attention_dropout is 0.1", "write 0"]),
        (("llama3", "--set", "model.sliding_windw=64"), 2, ["sliding_windw", "did you mean 'sliding_window'"]),
        (("llama3", "--tp", "3"), 2, ["--tp 3", "4 query heads", "--tp 1 or --tp 2"]),
        (
            ("llama3", "--set", "layout.sequence_parallel=maybe"),
            2,
            ["layout.sequence_parallel", "not true or false"],
        ),
        (("llama3", "--cp", "0"), 2, ["--cp 0", "at least 1"]),
        (("llama4",), 2, ["llama4", "did you mean 'llama3'"]),
        (("llama3", "--size", "7b"), 2, ["'7b'", "8b", "--from"]),
        (("llama3", "--set", "optim.lrr=1"), 2, ["optim.lrr", "did you mean 'optim.lr'"]),
        (("llama3", "--set", "model.hiden_size=1"), 2, ["hiden_size", "did you mean 'hidden_size'"]),
        (("llama3", "--attn", "sdap"), 2, ["sdap", "did you mean 'sdpa'"]),
        (("llama3", "--cp-scheme", "rings", "--cp", "2"), 2, ["rings", "did you mean 'ring'"]),
        (("llama3", "--track", "tensorbord"), 2, ["tensorbord", "did you mean 'tensorboard'"]),
        (("llama3", "--memory", "fill"), 2, ["fill", "did you mean 'full'"]),
        (("llama3", "--data", "nowhere.txt"), 5, ["nowhere.txt", "does not exist"]),
        (("llama3", "--overlong", "cut"), 2, ["data.overlong", "cut", "error, split, truncate, drop"]),
        (("llama3", "--dtype", "int8"), 2, ["int8", "float32"]),
        (("llama3", "--global-batch", "3", "--dp-shard", "2"), 2, ["--global-batch 3", "2 data-parallel", "nearest"]),
        (("llama3", "--steps", "0"), 2, ["schedule.steps (--steps): 0", "at least 1"]),
        (("llama3", "--resume", "nowhere"), 2, ["nowhere", "neither a run nor a checkpoint"]),
        ((), 2, ["which model?", "zoo models"]),
        (("--from", "scratch"), 2, ["which model?", "llama3 --from scratch"]),
        (("--from", "nowhere"), 2, ["nowhere does not exist"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(args, status, words, capsys, tmp_path):
    line = refused(capsys, *args, "--out", tmp_path / "run", status=status)
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest_key(capsys, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"schedule": {"stepps": 3}}))
    line = refused(capsys, "llama3", "-c", file, status=2)
    assert "schedule.stepps" in line
    assert str(file) in line
    assert "schedule.steps" in line


def test_a_missing_tokenizer_says_which_file_is_missing_where(capsys, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    line = refused(capsys, "llama3", "--from", checkpoint, "--data", __file__, status=5)
    assert "tokenizer.json" in line
    assert str(checkpoint) in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "one two"}\n{"text": \n', ["d.jsonl:2"]),
        ("", ["d.jsonl"]),
        ('{"text": "a"}\n["text"]\n', ["d.jsonl:2"]),
        ('{"txet": "a"}\n', ["txet"]),
        ('{"messages": [{"role": "user", "content": "a question"}]}\n', ["d.jsonl:1", "--loss-on"]),
    ],
)
def test_a_data_file_that_cannot_be_trained_on_is_named_with_its_line(content, words, capsys, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    line = refused(capsys, "llama3", "--data", file, "--seq", "64", "--out", tmp_path / "run", status=5)
    for word in words:
        assert word in line


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def missing(folder):
    name = "model.norm.weight"
    edit_index(folder, lambda weights: weights.pop(name))
    return [name]


def extra(folder):
    edit_index(folder, lambda weights: weights.update({"model.surplus": "model-00001-of-00002.safetensors"}))
    return ["model.surplus"]


def duplicate(folder):
    first = load_file(folder / "model-00001-of-00002.safetensors")
    second = load_file(folder / "model-00002-of-00002.safetensors")
    name = sorted(first)[0]
    save_file({**second, name: first[name]}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    return [name]


def outside(folder):
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "x.safetensors")
    edit_index(folder, lambda weights: weights.update(dict.fromkeys(sorted(weights)[::2], "../x.safetensors")))
    return ["../x.safetensors"]


def pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return ["pytorch_model.bin", "safetensors"]


@pytest.mark.parametrize("damage", [missing, extra, duplicate, outside, pickled])
def test_a_damaged_checkpoint_is_refused_and_names_what_is_wrong(damage, capsys, checkpoint, tmp_path):
    words = damage(checkpoint)
    args = (
        "llama3",
        "--from",
        checkpoint,
        "--data",
        __file__,
        "--seq",
        "64",
        "--steps",
        "1",
        "--out",
        tmp_path / "run",
    )
    line = refused(capsys, *args, status=5)
    for word in words:
        assert word in line


def test_an_undamaged_checkpoint_in_two_shards_trains(checkpoint, tmp_path):
    args = (
        "llama3",
        "--from",
        checkpoint,
        "--data",
        __file__,
        "--seq",
        "64",
        "--steps",
        "2",
        "--out",
        tmp_path / "run",
    )
    run_zoo("finetune", *args)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_run_that_failed_to_start_does_not_hold_its_directory(capsys, checkpoint, tmp_path):
    args = (
        "llama3",
        "--from",
        checkpoint,
        "--data",
        __file__,
        "--seq",
        "64",
        "--steps",
        "1",
        "--out",
        tmp_path / "run",
    )
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    first = refused(capsys, *args, status=5)
    assert refused(capsys, *args, status=5) == first
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["finetune", *map(str, args)]) == 0


def test_a_run_can_be_repeated_from_its_config(tmp_path):
    run_zoo("finetune", "llama3", "--seq", "64", "--steps", "2", "--dtype", "float64", "--out", tmp_path / "a")
    run_zoo("finetune", "-c", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_what_is_odd_about_the_data_is_said_before_the_first_step(tmp_path):
    """Pieces of split conversations without a label are left out, so that no step is without one."""
    said = {"role": "assistant", "content": "yes " * 8}
    rows = [
        {"messages": [{"role": "user", "content": "word " * 300}, said]},
        {"messages": [{"role": "user", "content": "hi"}, {**said, "thinking": "hm"}]},
    ]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}")
    words = ["--data", data, "--chat-template", tmp_path / "t.jinja", "--overlong", "split", "--seq", "64"]
    _, err = run_zoo("finetune", "llama3", *words, "--steps", "3", "--out", tmp_path / "run")
    before = err[: err.index("step 1/3")]
    assert re.search(r"\nrows .*; \d+ pieces without a label left out\nwarning ", before)
    assert "turns whose reasoning the chat template leaves out or changes" in before
    assert "markers that the vocabulary lacks" in before
    assert err.count("\nrows ") == 2
    assert all(metrics["trained_tokens"] > 0 for metrics in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_keeps_what_was_saved(tmp_path):
    args = ("finetune", "llama3", "--seq", "64", "--save-every", "1", "--out", tmp_path / "run")
    run_zoo(*args, "--steps", "1")
    _, err = run_zoo(*args, "--steps", "9", "--lr", "1e30", "--set", "optim.clip=0", status=6)
    assert "step 3" in err or "step 2" in err
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "progress.json").is_file()
