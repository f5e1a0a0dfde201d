"""config.json of any family: read as transformers reads it, refused where it is hostile, written for 4 and 5."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig

from tests.models.test_families import every_family, module_of
from tools.reference import FAMILIES, ROPES, draw_fields
from zoo.core.errors import DataError
from zoo.models.llama3.config import hub_config, override, parse
from zoo.models.llama3.sizes import SIZES

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
@every_family
def test_a_written_config_is_read_alike_by_transformers_and_by_us(family, seed):
    known = FAMILIES[family]
    config = known.spec.parse(draw_fields(seed, family))
    written = json.loads(json.dumps(known.spec.hub_config(config)))
    assert known.spec.parse(written) == config
    theirs = known.config.from_dict(written)
    own = type(config).__dataclass_fields__.keys() - {"windows", "rope_parameters", "eos_token_id"}
    assert {name: getattr(theirs, name) for name in own} == {name: getattr(config, name) for name in own}
    assert theirs.rope_parameters == config.rope_parameters.as_dict()


@every_family
def test_all_rope_fields_are_always_written(family):
    """transformers 4 reads those at the top only; 5 forgets theta if `rope_theta` is missing beside `rope_scaling`."""
    spec = FAMILIES[family].spec
    for rope in ROPES.values():
        written = spec.hub_config(spec.parse({"rope_parameters": rope | {"rope_theta": 5e5}}))
        assert written["rope_theta"] == 5e5
        assert (written["rope_scaling"] is None) == (rope["rope_type"] == "default")
        assert written["rope_parameters"]["rope_theta"] == 5e5
        assert not {"rope_theta", "partial_rotary_factor"} & (written["rope_scaling"] or {}).keys()
        partial = written["rope_parameters"].get("partial_rotary_factor")
        assert written.get("partial_rotary_factor") == partial


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
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
    ],
    ids=str,
)
@every_family
def test_a_hostile_config_is_refused_in_one_line_that_names_the_field(family, fields, word):
    _check_refused(family, fields, word)


@pytest.mark.parametrize(
    ("family", "fields", "word"),
    [
        ("llama3", {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ("llama3", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama3", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama3", {"hidden_size": 100, "num_attention_heads": 8}, "multiple of num_attention_heads"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 2**30}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 1024, "num_hidden_layers": 1024}, "num_local_experts"),
        ("mixtral", {"num_experts": "8"}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok (5)"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ("mixtral", {"output_router_logits": "yes"}, "output_router_logits"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("mixtral", {"sliding_window": 4096.0}, "sliding_window"),
        ("nemotron", {"norm_eps": -1e-5}, "norm_eps"),
        ("nemotron", {"layer_norm_eps": "small"}, "norm_eps"),
        ("nemotron", {"kv_channels": 10**9}, "head_dim"),
        ("nemotron", {"mlp_bias": 1}, "mlp_bias"),
        ("nemotron", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("nemotron", {"partial_rotary_factor": float("nan")}, "partial_rotary_factor"),
        ("nemotron", {"rope_percent": "half"}, "partial_rotary_factor"),
        ("nemotron", {"partial_rotary_factor": 0.0}, "of which 0 are rotated"),
        ("nemotron", {"head_dim": 10}, "of which 5 are rotated"),
    ],
    ids=str,
)
def test_a_familys_own_hostile_fields_are_refused(family, fields, word):
    _check_refused(family, fields, word)


def _check_refused(family, fields, word):
    with pytest.raises(DataError) as error:
        FAMILIES[family].spec.parse(fields)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@every_family
def test_any_json_is_a_config_or_a_data_error(family):
    spec = FAMILIES[family].spec
    names = sorted({*spec.hub_config(spec.parse({})), *spec.optional_fields})

    @settings(max_examples=300, deadline=None)
    @given(st.dictionaries(st.sampled_from(names), _JSON, max_size=4))
    def check(fields):
        try:
            config = spec.parse(fields)
        except DataError:
            return
        assert spec.parse(spec.hub_config(config)) == config

    check()


COUNTS = {
    "llama3": {
        "3.2-1b": 1_235_814_400,
        "3.2-3b": 3_212_749_824,
        "8b": 8_030_261_248,
        "70b": 70_553_706_496,
        "3.1-8b": 8_030_261_248,
        "3.1-70b": 70_553_706_496,
        "3.1-405b": 405_853_388_800,
        "3.3-70b": 70_553_706_496,
    },
    "mixtral": {"8x3b": 18_305_026_560, "8x7b": 46_702_792_704, "8x22b": 140_630_071_296},
    "nemotron": {
        "minitron-4b": 4_190_509_056,
        "minitron-8b": 8_271_699_968,
        "8b": 8_540_135_424,
        "22b": 21_266_116_608,
        "15b": 15_628_775_424,
        "340b": 341_029_195_776,
    },
}


@every_family
def test_sizes_have_the_published_number_of_parameters(family):
    """What is published, what is listed, what is computed from the fields, and what is built."""
    sizes, num_parameters = module_of(family, "sizes"), module_of(family, "config").num_parameters
    assert sizes.SIZES.keys() == sizes.PARAMETERS.keys()
    assert {name: sizes.PARAMETERS[name] for name in sizes.SIZES.keys() - {"tiny"}} == COUNTS[family]
    for name, fields in sizes.SIZES.items():
        config = FAMILIES[family].spec.parse(fields)
        assert num_parameters(config) == sizes.PARAMETERS[name]
        assert _built(family, config) == sizes.PARAMETERS[name]


@pytest.mark.parametrize("seed", range(4))
@every_family
def test_parameters_are_counted_as_the_model_has_them(family, seed):
    config = FAMILIES[family].spec.parse(draw_fields(seed, family))
    assert module_of(family, "config").num_parameters(config) == _built(family, config)


def _built(family, config):
    with torch.device("meta"):
        model = FAMILIES[family].spec.build(config)
    return sum(parameter.numel() for parameter in model.parameters())


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
@every_family
def test_rope_for_longer_rows_stretches_every_type(family, rope):
    spec, plugin = FAMILIES[family].spec, module_of(family, "plugin")
    given = {"max_position_embeddings": 256, "rope_parameters": ROPES[rope] | {"rope_theta": 1e4}}
    fields = spec.hub_config(spec.parse(given))
    longer = spec.parse(spec.override(fields, plugin.zoo_rope_for_length(family, fields, 1024)))
    assert longer.max_position_embeddings == 1024
    before = spec.parse(fields).rope_parameters
    if rope in ("linear", "yarn"):
        assert longer.rope_parameters.factor == before.factor * 4
        assert longer.rope_parameters.rope_theta == 1e4
    else:
        assert longer.rope_parameters.rope_theta == 16e4
    assert longer.rope_parameters.original_max_position_embeddings == before.original_max_position_embeddings
    assert longer.rope_parameters.partial_rotary_factor == before.partial_rotary_factor
    assert plugin.zoo_rope_for_length("another", fields, 1024) is None


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama3", {}),
        ("llama3", {"num_key_value_heads": None}),
        ("mixtral", {}),
        ("mixtral", {"num_key_value_heads": 4}),
    ],
    ids=str,
)
def test_absent_and_null_heads_are_transformers(family, given):
    known = FAMILIES[family]
    fields = {"num_attention_heads": 16, "hidden_size": 256} | given
    theirs = known.config.from_dict(dict(fields))
    ours = known.spec.parse(fields)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == 16 == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)


@every_family
def test_null_heads_are_as_many_as_query_heads(family):
    """As transformers 4 reads it; 5.23 refuses a Mixtral's null and crashes on a Nemotron's."""
    fields = {"num_attention_heads": 16, "hidden_size": 256, "num_key_value_heads": None}
    assert FAMILIES[family].spec.parse(fields).num_key_value_heads == 16


@every_family
def test_heads_set_by_hand_stay_and_derived_ones_follow(family):
    spec = FAMILIES[family].spec
    small = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": None}
    changed = spec.parse(spec.override(spec.hub_config(spec.parse(small)), {"num_attention_heads": 4}))
    assert (changed.head_dim, changed.num_key_value_heads) == (16, 4)
    apart = small | {"head_dim": 24, "num_key_value_heads": 2}
    changed = spec.parse(spec.override(spec.hub_config(spec.parse(apart)), {"num_attention_heads": 4}))
    assert (changed.head_dim, changed.num_key_value_heads) == (24, 2)


def test_nemotrons_older_names_are_read():
    """transformers takes a head size of 85 for this one and crashes on its null."""
    spec = FAMILIES["nemotron"].spec
    old = {"hidden_size": 4096, "num_attention_heads": 48, "kv_channels": 128, "layer_norm_eps": 1e-6}
    config = spec.parse(old | {"rope_percent": 0.25, "num_key_value_heads": None})
    assert (config.head_dim, config.norm_eps, config.num_key_value_heads) == (128, 1e-6, 48)
    assert config.rope_parameters.partial_rotary_factor == 0.25
    written = spec.hub_config(config)
    assert (written["head_dim"], written["num_key_value_heads"], written["norm_eps"]) == (128, 48, 1e-6)
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert spec.parse(old | {"head_dim": 64}).head_dim == 64, "today's name wins"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_scaling": LINEAR, "partial_rotary_factor": 0.25},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ],
    ids=str,
)
def test_the_partial_factor_has_transformers_precedence(fields):
    known = FAMILIES["nemotron"]
    theirs = known.config.from_dict(json.loads(json.dumps(fields)))
    theirs.standardize_rope_params()
    expected = {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
    assert known.spec.parse(fields).rope_parameters.as_dict() == expected


def test_a_new_partial_factor_reaches_both_places():
    spec = FAMILIES["nemotron"].spec
    fields = spec.hub_config(spec.parse({"rope_scaling": LINEAR}))
    for changed in (
        spec.override(fields, {"partial_rotary_factor": 0.25}),
        spec.override(spec.override(fields, {"partial_rotary_factor": 0.25}), {"rope_theta": 5e5}),
        spec.override(spec.override(fields, {"partial_rotary_factor": 0.25}), {"rope_scaling": LINEAR}),
    ):
        assert changed["partial_rotary_factor"] == changed["rope_parameters"]["partial_rotary_factor"] == 0.25
        assert changed["rope_parameters"]["rope_type"] == "linear"
