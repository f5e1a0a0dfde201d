"""config.json of any Llama: read as transformers reads it, refused where it is hostile, written for 4 and 5."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tests.models.reference import ROPES, draw_fields
from zoo.core.errors import DataError
from zoo.models.llama3.config import hub_config, num_parameters, override, parse
from zoo.models.llama3.model import SPEC
from zoo.models.llama3.plugin import zoo_rope_for_length
from zoo.models.llama3.sizes import PARAMETERS, SIZES

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500_000, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_scaling": LINEAR},
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 7e5, "rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "original_max_position_embeddings": 64},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    ],
    ids=str,
)
def test_rope_precedence_is_transformers(fields):
    fields = {"max_position_embeddings": 4096} | fields
    theirs = LlamaConfig.from_dict(json.loads(json.dumps(fields)))
    theirs.standardize_rope_params()
    expected = {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
    assert parse(fields).rope_parameters.as_dict() == expected


@pytest.mark.parametrize("seed", range(12))
def test_a_written_config_is_read_alike_by_transformers_and_by_us(seed):
    config = parse(draw_fields(seed))
    written = json.loads(json.dumps(hub_config(config)))
    assert parse(written) == config
    theirs = LlamaConfig.from_dict(written)
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "mlp_bias"):
        assert getattr(theirs, name) == getattr(config, name)
    assert theirs.rope_parameters == config.rope_parameters.as_dict()


def test_all_three_rope_fields_are_always_written():
    """transformers 4 reads the first two only; 5 forgets theta if the first is missing beside the second."""
    for rope in ROPES.values():
        written = hub_config(parse({"rope_parameters": rope | {"rope_theta": 5e5}}))
        assert written["rope_theta"] == 5e5
        assert (written["rope_scaling"] is None) == (rope["rope_type"] == "default")
        assert written["rope_parameters"]["rope_theta"] == 5e5
        assert "rope_theta" not in (written["rope_scaling"] or {})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "multiple of num_attention_heads"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "gemma"}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"eos_token_id": [1, 2**40]}, "eos_token_id"),
        ({"bos_token_id": 2**40}, "bos_token_id"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_a_hostile_config_is_refused_in_one_line_that_names_the_field(fields, word):
    with pytest.raises(DataError) as error:
        parse(fields)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(hub_config(parse({})))), _JSON, max_size=4))
def test_any_json_is_a_config_or_a_data_error(fields):
    try:
        config = parse(fields)
    except DataError:
        return
    assert parse(hub_config(config)) == config


COUNTS = {
    "3.2-1b": 1_235_814_400,
    "3.2-3b": 3_212_749_824,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "3.1-8b": 8_030_261_248,
    "3.1-70b": 70_553_706_496,
    "3.1-405b": 405_853_388_800,
    "3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize(("size", "count"), COUNTS.items())
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    with torch.device("meta"):
        model = SPEC.build(parse(SIZES[size]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_new_rope_field_reaches_all_three_places():
    fields = hub_config(parse(SIZES["3.1-8b"]))
    changed = override(fields, {"rope_theta": 1e6})
    assert parse(changed).rope_parameters.rope_theta == 1e6
    assert changed["rope_parameters"]["rope_theta"] == changed["rope_theta"] == 1e6
    assert parse(changed).rope_parameters.rope_type == "llama3"
    assert parse(override(fields, {"rope_scaling": None})).rope_parameters.rope_type == "default"
    assert parse(override(fields, {"rope_scaling": LINEAR})).rope_parameters.rope_theta == 5e5


def test_a_new_length_leaves_the_original_length_alone():
    fields = hub_config(parse({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512}))
    assert (
        parse(override(fields, {"max_position_embeddings": 4096})).rope_parameters.original_max_position_embeddings
        == 512
    )


def test_heads_follow_a_new_width():
    fields = hub_config(parse({"hidden_size": 64, "num_attention_heads": 8}))
    changed = parse(override(fields, {"hidden_size": 128, "num_attention_heads": 4}))
    assert (changed.head_dim, changed.num_key_value_heads) == (32, 4)
    fields = hub_config(parse({"hidden_size": 64, "num_attention_heads": 8, "head_dim": 24, "num_key_value_heads": 2}))
    changed = parse(override(fields, {"hidden_size": 128}))
    assert (changed.head_dim, changed.num_key_value_heads) == (24, 2)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_for_longer_rows_stretches_every_type(rope):
    fields = hub_config(parse({"max_position_embeddings": 256, "rope_parameters": ROPES[rope] | {"rope_theta": 1e4}}))
    longer = parse(override(fields, zoo_rope_for_length("llama3", fields, 1024)))
    assert longer.max_position_embeddings == 1024
    before = parse(fields).rope_parameters
    if rope in ("linear", "yarn"):
        assert longer.rope_parameters.factor == before.factor * 4
        assert longer.rope_parameters.rope_theta == 1e4
    else:
        assert longer.rope_parameters.rope_theta == 16e4
    assert longer.rope_parameters.original_max_position_embeddings == before.original_max_position_embeddings
    assert zoo_rope_for_length("another", fields, 1024) is None


@pytest.mark.parametrize(
    ("size", "published"),
    [("3.2-1b", 1_235_814_400), ("3.2-3b", 3_212_749_824), ("8b", 8_030_261_248), ("70b", 70_553_706_496)]
    + [("3.1-405b", 405_853_388_800)],
)
def test_parameter_counts_are_the_published_ones(size, published):
    assert PARAMETERS[size] == published


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_fields(size):
    assert PARAMETERS[size] == num_parameters(parse(SIZES[size]))


@pytest.mark.parametrize("biased", [False, True])
def test_parameters_are_counted_as_the_model_has_them(biased):
    config = parse({**SIZES["tiny"], "attention_bias": biased, "mlp_bias": biased})
    with torch.device("meta"):
        model = SPEC.build(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
