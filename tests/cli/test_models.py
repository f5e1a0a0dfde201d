"""`zoo models`: every size of every family, from what entries say of themselves."""

import json

import pytest

from zoo.cli.main import main

SHAPE = ("LAYERS", "HIDDEN", "HEADS", "KV", "CONTEXT", "VOCAB")
MODEL = """
from zoo import hookimpl
from zoo.core.contracts import ModelEntry

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


def test_the_table_has_a_row_for_each_size(mini, capsys):
    assert main(["models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["MODEL", "SIZE", "PARAMS", *SHAPE, "CHECKPOINT", "FROM"]
    assert ["mini", "small", "-", "2", "64", "4", "4", "-", "512", "-", "zoo-mini"] in rows
    assert ["mini", "large", "123.00K", "2", "64", "4", "2", "128k", "512", "org/mini-large", "zoo-mini"] in rows


def test_the_builtin_family_is_there(capsys):
    main(["models"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shape = ["32", "4096", "32", "8", "8k", "128256"]
    assert ["llama3", "8b", "8.03B", *shape, "meta-llama/Meta-Llama-3-8B", "zoo"] in rows


def test_json(mini, capsys):
    main(["models", "--json"])
    rows = {(row["model"], row["size"]): row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["mini", "large"]["context"] == 131072
    assert rows["mini", "large"]["default"]
    assert not rows["mini", "small"]["default"]
    assert rows["mini", "small"]["dist"] == "zoo-mini"
    assert rows["llama3", "tiny"]["checkpoint"] == "embedded"
