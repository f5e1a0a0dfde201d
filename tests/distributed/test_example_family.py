"""The package in examples/zoo-pico: every layout of its family is one process in fp64, and its rules and RoPE work."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.harness.pooled_command import command, train
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

PACKAGE = Path(__file__).parents[2] / "examples" / "zoo-pico"
LAYOUTS = [
    "--cp 2 --attn fp64",
    "--cp 2 --cp-scheme allgather",
    "--tp 2",
    "--tp 2 --set layout.sequence_parallel=false",
    "--dp-shard 2",
    "--pp 2",
    "--tp 2 --cp 2",
    "--pp 2 --tp 2 --memory full",
]
JOB = ["--seq", 96, "--steps", 2, "--global-batch", 2, "--dtype", "float64", "--set", "model.sliding_window=20"]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A file that gives what the package gives, to this process and to ranks that run already."""
    file = tmp_path_factory.mktemp("plugin") / "pico.py"
    file.write_text(f"import sys\n\nsys.path.insert(0, {str(PACKAGE)!r})\nfrom zoo_pico.plugin import *\n")
    return file


@pytest.fixture(scope="module")
def alone(plugin, tmp_path_factory):
    """The run of one process: its directory and its numbers."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, train(out, "pico", "--plugin", plugin, *JOB, "--set", "checkpoint.every=2")


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_one_process(layout, plugin, alone, tmp_path):
    rows = train(tmp_path, "pico", "--plugin", plugin, *JOB, *layout.split())
    assert len(rows) == 2
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in alone[1]], rel=1e-9), key


def test_an_export_has_the_names_on_disk_and_is_read_back(plugin, alone, tmp_path):
    run, _ = alone
    command("--plugin", plugin, "export", run, "--to", "hf", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.0.mlp.c_fc.weight", "model.layers.1.mlp.c_proj.weight"} <= names
    assert not any("up_proj" in name for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("pico", 20)
    command("--plugin", plugin, "plan", "pico", "--from", tmp_path / "out", "--data", "stdlib", "--seq", 96)


def test_rope_is_stretched_for_longer_rows_and_set_by_hand(plugin):
    plugins = Plugins.load(only=[], files=[plugin])
    registry = Registry(plugins)
    spec, (entry,) = registry.models.load("pico"), [e for e in registry.models if e.name == "pico"]
    fields = spec.hub_config(spec.parse(entry.sizes["tiny"]))
    longer = spec.parse(spec.override(fields, registry.rope_for_length("pico", fields, 4096)))
    assert longer.max_position_embeddings == 4096
    assert longer.rope_parameters.rope_theta == 16 * 10_000.0
    assert spec.parse(spec.override(fields, {"rope_theta": 5e5})).rope_parameters.rope_theta == 5e5
    assert spec.hub_config(longer) == spec.hub_config(spec.parse(spec.hub_config(longer)))
    assert longer.windows == (256, None)
