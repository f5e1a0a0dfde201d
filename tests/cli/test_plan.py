"""`zoo plan`: every size of every family from random weights, and a family that only its checkpoint names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import zoo
import zoo.models.llama3
from tools import nas_checkpoint as nas
from zoo.cli.main import main
from zoo.core.errors import UsageError
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.run.metrics import read_metrics

MODELS = list(Registry(Plugins.load()).models)
SIZES = [(entry.name, size) for entry in MODELS for size in entry.sizes]
EMBEDDED = [(entry.name, path) for entry in MODELS for path in entry.embedded.values()]
TINY = Path(zoo.models.llama3.__file__).parent / "tiny"


def command(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_size_is_planned_from_random_weights_or_does_not_fit(family, size, capsys):
    status = command("plan", family, "--size", size, "--from", "scratch", "--data", __file__, "--seq", "64")
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if status == 0:
        assert f"{family} {size}, random weights" in said.out
    else:
        (line,) = said.err.splitlines()
        assert status == 3, line
        assert f"{family} has " in line


@pytest.mark.parametrize("family", [entry.name for entry in MODELS])
def test_the_size_of_a_family_that_is_small_fits(family, capsys):
    assert command("plan", family, "--size", "tiny", "--from", "scratch", "--data", __file__, "--seq", "64") == 0


@pytest.mark.dist
def test_the_family_without_a_checkpoint_trains_from_random_weights(tmp_path, capsys):
    run = tmp_path / "run"
    words = ("nemotron-nas", "--from", "scratch", "--seq", "64", "--steps", "2", "--out", run)
    assert command("finetune", *words) == 0
    assert [step["step"] for step in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert command("export", run, "--to", "hf") == 0
    assert zoo.plan(from_=str(run / "hf"), data=__file__, seq=64).model == "nemotron-nas"


def test_families_without_a_checkpoint_have_the_tokenizer_of_those_with_one():
    for entry in MODELS:
        if entry.tokenizer is not None:
            for file in Path(entry.tokenizer).iterdir():
                assert file.read_bytes() == (TINY / file.name).read_bytes()


@pytest.mark.parametrize(("family", "path"), EMBEDDED)
def test_a_checkpoint_names_its_family(family, path, capsys):
    words = ("--from", path, "--data", __file__, "--seq", "64", "--json")
    assert command("plan", *words) == 0
    unnamed = json.loads(capsys.readouterr().out)
    assert command("plan", family, *words) == 0
    assert unnamed == json.loads(capsys.readouterr().out)
    assert unnamed["job"]["model"]["name"] == family


def test_the_layout_that_is_chosen_for_a_checkpoint_needs_no_name_either(tmp_path, capsys):
    words = ("--from", nas.save(tmp_path / "nas"), "--layout-only", "--layout", "auto", "--seq", "64")
    assert command("plan", *words) == 0
    assert "dp_shard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt5"}, "its config.json says model_type 'gpt5'"),
        ({"model_type": None}, "its config.json has no model_type"),
    ],
)
@pytest.mark.parametrize(
    "start",
    [
        ("plan", "--data", __file__, "--from"),
        ("finetune", "--data", __file__, "--from"),
        ("plan", "llama3", "--data", __file__, "--from"),
        ("export", "--to", "hf"),
    ],
)
def test_an_unknown_model_type_is_said_with_those_that_are_known(tmp_path, capsys, change, words, start):
    folder = shutil.copytree(TINY, tmp_path / "other")
    (folder / "zoo-checksums.txt").unlink(missing_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    out = [tmp_path / "out"] if start[0] == "export" else []
    assert command(*start, folder, *out) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line
    assert "known: llama, ministral, mistral, mixtral, nemotron, nemotron-nas" in line
    with pytest.raises(UsageError, match="known: llama"):
        zoo.load(folder)


def test_a_checkpoint_that_only_the_nodes_have_must_be_named(capsys):
    words = ("launch", "slurm", "--print", "--nodes", "1", "--", "finetune", "--from", "/nodes/only", "--data", "x")
    assert command(*words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--from /nodes/only is not on this machine; name its family too" in line
