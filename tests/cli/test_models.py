"""`zoo models`: every size of every family, from what entries say of themselves."""

import json
import re

import pytest

from zoo.cli.main import main
from zoo.core.model.axis_limits import AxisLimits, axis_limits

SHAPE = ("LAYERS", "HIDDEN", "HEADS", "KV", "CONTEXT", "VOCAB")
CUT = ("CP", "TP", "EP", "PP")
MODEL = """
from zoo import hookimpl
from zoo import ModelEntry

@hookimpl
def zoo_register_models():
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    large = {**small, "num_key_value_heads": 2, "max_position_embeddings": 131072}
    return [ModelEntry(name="mini", target="nowhere:SPEC", model_type="mini", default_size="large",
                       sizes={"small": small, "large": large}, parameters={"large": 123000},
                       hub_ids={"large": "org/mini-large"})]
"""


@pytest.fixture
def mini(distributions):
    distributions.add("zoo-mini", MODEL)


def words(line):
    """Cells of a line: they are two blanks apart."""
    return [cell.strip() for cell in re.split(r"\s{2,}", line)]


def test_the_table_has_a_row_for_each_size(mini, capsys):
    assert main(["models"]) == 0
    rows = [words(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["MODEL", "SIZE", "PARAMS", *SHAPE, *CUT, "CHECKPOINT", "FROM"]
    cut = ["any", "div 4", "-", "1-2"]
    assert ["mini", "small", "-", "2", "64", "4", "4", "-", "512", *cut, "-", "zoo-mini"] in rows
    cut = ["any", "div 2", "-", "1-2"]
    assert ["mini", "large", "123.00K", "2", "64", "4", "2", "128k", "512", *cut, "org/mini-large", "zoo-mini"] in rows


@pytest.mark.parametrize(
    "row",
    [
        "llama3 8b 8.03B 32 4096 32 8 8k 128256 any div_8 - 1-32 meta-llama/Meta-Llama-3-8B",
        "mixtral 8x7b 46.70B 32 4096 32 8 32k 32000 any div_8 div_8 1-32 mistralai/Mixtral-8x7B-v0.1",
        "mixtral 8x3b 18.31B 32 2560 32 8 32k 32000 any div_8 div_8 1-32 -",
        "nemotron minitron-8b 8.27B 32 4096 48 8 4k 256000 any div_8 - 1-32 nvidia/Minitron-8B-Base",
        "nemotron 340b 341.03B 96 18432 96 8 4k 256000 any div_8 - 1-96 -",
        "nemotron 22b 21.27B 40 6144 48 48 4k 256000 any div_48 - 1-40 -",
        "nemotron-nas tiny 1.16M 6 128 4 1-4 1k 2048 any div_1 - 1-6 -",
    ],
)
def test_the_builtin_families_are_there(row, capsys):
    main(["models"])
    rows = [words(line) for line in capsys.readouterr().out.splitlines()]
    assert [*(word.replace("_", " ") for word in row.split()), "zoo"] in rows


def test_axes_that_nothing_serves_are_named(capsys):
    """A column says what the model allows, not what is installed."""
    main(["--no-plugin", "context", "--no-plugin", "fsdp", "models"])
    assert "no plugin here serves --cp" in capsys.readouterr().out
    main(["--no-plugin", "context", "models", "--json"])
    assert "ep" not in json.loads(capsys.readouterr().out)["unserved_axes"]


@pytest.mark.parametrize(
    ("fields", "by_layer", "tp", "ep", "pp"),
    [
        ({}, (), None, None, None),
        ({"num_attention_heads": 12}, (), (1, 2, 3, 4, 6, 12), None, None),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, (), (1, 2, 4), None, None),
        ({"num_attention_heads": 12, "num_key_value_heads": None}, (6, 4), (1, 2), None, None),
        ({"num_local_experts": 6, "num_hidden_layers": 3}, (), None, (1, 2, 3, 6), 3),
        ({"num_experts": 2, "num_hidden_layers": True}, (), None, (1, 2), None),
        ({"num_attention_heads": "12", "num_local_experts": 0, "num_hidden_layers": 2.0}, (), None, None, None),
    ],
    ids=str,
)
def test_what_axes_allow_follows_from_the_fields(fields, by_layer, tp, ep, pp):
    assert axis_limits(fields, by_layer) == AxisLimits(tp=tp, ep=ep, pp=pp)


def test_json(mini, capsys):
    main(["models", "--json"])
    rows = {(row["model"], row["size"]): row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["mini", "large"]["context"] == 131072
    assert rows["mini", "large"]["allows"] == {"cp": "any", "tp": [1, 2], "ep": None, "pp": 2}
    assert rows["mixtral", "8x7b"]["allows"]["ep"] == [1, 2, 4, 8]
    assert rows["mini", "large"]["default"]
    assert not rows["mini", "small"]["default"]
    assert rows["mini", "small"]["dist"] == "zoo-mini"
    assert rows["llama3", "tiny"]["checkpoint"] == "embedded"
