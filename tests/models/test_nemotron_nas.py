"""Nemotron-NAS: blocks that differ and may lack parts, against their formula, and as the engine sees them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tools import nas_checkpoint as nas
from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.globs import find_modules
from zoo.core.errors import DataError
from zoo.models.nemotron_nas.config import num_parameters
from zoo.models.nemotron_nas.model import SPEC
from zoo.models.nemotron_nas.plugin import zoo_match_checkpoint, zoo_rope_for_length
from zoo.models.nemotron_nas.sizes import KV_HEADS, PARAMETERS, SIZES

SEEDS = 24


def test_the_drawn_configs_have_every_kind_of_block():
    blocks = [block for seed in range(SEEDS) for block in nas.draw_fields(seed)["block_configs"]]
    for part in ("attention", "ffn"):
        for kind in ("no_op", "replace_with_linear"):
            assert {block[part][kind] for block in blocks} == {True, False}
    assert any(block["attention"]["no_op"] and block["ffn"]["no_op"] for block in blocks)
    assert len({block["attention"]["n_heads_in_group"] for block in blocks}) > 3


@pytest.mark.parametrize("seed", range(SEEDS))
def test_logits_and_gradients_are_the_formulas(seed):
    fields = nas.draw_fields(seed)
    torch.manual_seed(seed)
    model = SPEC.build(SPEC.parse(fields)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 97, (2, 40))
    logits, expected = model(tokens), nas.formula(weights, fields, tokens)
    assert (logits - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - weights[name].grad).norm() <= 1e-9 * max(1.0, weights[name].grad.norm().item()), name


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_config_survives_writing_and_its_weights_are_counted(seed):
    fields = nas.draw_fields(seed)
    config = SPEC.parse(fields)
    assert SPEC.parse(json.loads(json.dumps(SPEC.hub_config(config)))) == config
    assert SPEC.parse(SPEC.override(SPEC.hub_config(config), {})) == config
    with torch.device("meta"):
        model = SPEC.build(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_the_size_has_the_parameters_and_heads_that_are_listed():
    config = SPEC.parse(SIZES["tiny"])
    assert num_parameters(config) == PARAMETERS["tiny"]
    assert tuple(shape.num_kv_heads for shape in SPEC.heads(config)) == KV_HEADS["tiny"]


@pytest.mark.parametrize(("mult", "hidden", "width"), [(2.625, 8192, 14336), (5.25, 8192, 28672), (0.5, 8192, 2816)])
def test_widths_are_rounded_up_as_the_hub_does(mult, hidden, width):
    """The first two are those of Llama-3 70B's halves, the third falls between multiples of 256."""
    block = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": mult}}
    fields = {"hidden_size": hidden, "num_attention_heads": 64, "num_hidden_layers": 1, "block_configs": [block]}
    assert SPEC.parse(fields).block_configs[0].intermediate_size == width


def test_a_part_that_is_left_out_has_neither_weights_nor_norm():
    model = SPEC.build(SPEC.parse(SIZES["tiny"]))
    names = {
        i: sorted(
            {
                name.split(".", 3)[3].rpartition(".")[0]
                for name in dict(model.named_parameters())
                if name.startswith(f"model.layers.{i}.")
            }
        )
        for i in range(6)
    }
    attention = [f"self_attn.{name}_proj" for name in "kovq"]
    mlp = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert names[0] == sorted([*attention, *mlp, "input_layernorm", "post_attention_layernorm"])
    assert names[1] == sorted([*mlp, "post_attention_layernorm"])
    assert names[2] == ["input_layernorm", "self_attn.linear_attn"]
    assert names[3] == sorted([*attention, "mlp.linear_mlp", "input_layernorm", "post_attention_layernorm"])
    assert names[4] == sorted([*attention, "input_layernorm"])


def test_core_hears_of_the_heads_of_each_attention_layer():
    config = SPEC.parse(SIZES["tiny"])
    shapes = [HeadShape(num_heads=4, num_kv_heads=g, head_dim=32) for g in (2, 1, 2, 4)]
    assert list(SPEC.heads(config)) == shapes
    assert SPEC.windows(config) == [None] * 4


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_plan_speaks_of_what_there_is(seed):
    config = SPEC.parse(nas.draw_fields(seed))
    with torch.device("meta"):
        model = SPEC.build(config)
    plan = SPEC.plan(config)
    cut = {name for glob in plan.tensor for name in find_modules(model, glob)}
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters()} <= cut
    for glob in plan.seams.values():
        assert all(not list(model.get_submodule(name).parameters()) for name in find_modules(model, glob))
    assert SPEC.flops_per_token(config, 0.0) == 6 * sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim == 2 and (config.tie_word_embeddings or "embed" not in n)
    )


FULL = {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 1.0}}


def _with(part: str, **fields: object) -> dict:
    return {"block_configs": [FULL | {part: FULL[part] | fields}]}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "block_configs is None"),
        ({"block_configs": "all"}, "block_configs is 'all'"),
        ({"block_configs": []}, "must list the 1 num_hidden_layers"),
        ({"block_configs": [FULL, FULL]}, "a list of 2"),
        ({"block_configs": [7]}, "block_configs[0].attention is missing"),
        ({"block_configs": [{"attention": FULL["attention"]}]}, "block_configs[0].ffn is missing"),
        ({"block_configs": [FULL | {"ffn": [1]}]}, "ffn is [1]"),
        ({"block_configs": [FULL | {"attention": {"no_op": True}}]}, "no block with attention"),
        (_with("attention", n_heads_in_group=None), "n_heads_in_group"),
        (_with("attention", n_heads_in_group=3), "must divide num_attention_heads (4)"),
        (_with("attention", n_heads_in_group=10**30), "n_heads_in_group"),
        (_with("attention", window_length=512), "window_length"),
        (_with("attention", num_sink_tokens=4), "num_sink_tokens"),
        (_with("attention", no_op=True, replace_with_linear=True), "a part is one of them"),
        (_with("attention", no_op=1), "no_op"),
        (_with("ffn", ffn_mult=1e300), "ffn_mult"),
        (_with("ffn", ffn_mult=1024.0, sparsify=["x"]), "sparsify"),
        (_with("ffn", ffn_mult=-1.0), "ffn_mult"),
        (_with("ffn", ffn_mult=0.0), "a width of 0"),
        (_with("ffn", ffn_mult=None), "intermediate_size"),
        ({"hidden_size": 66, "block_configs": [FULL]}, "multiple of num_attention_heads"),
    ],
    ids=str,
)
def test_hostile_blocks_are_refused_in_one_line_that_names_them(fields, word):
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    with pytest.raises(DataError) as error:
        SPEC.parse(small | fields)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


_JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
_PART = st.dictionaries(st.sampled_from(["n_heads_in_group", "no_op", "replace_with_linear", "ffn_mult", "x"]), _JSON)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["attention", "ffn"]), _PART | _JSON) | _JSON, max_size=2))
def test_any_json_is_blocks_or_a_data_error(blocks):
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "block_configs": [FULL, *blocks]}
    try:
        config = SPEC.parse(fields)
    except DataError:
        return
    assert SPEC.parse(SPEC.hub_config(config)) == config


def test_the_plugin_knows_its_own():
    assert zoo_match_checkpoint({"model_type": "nemotron-nas"}) == "nemotron-nas"
    assert zoo_match_checkpoint({"model_type": "nemotron"}) is None
    longer = SPEC.override(
        SPEC.hub_config(SPEC.parse(SIZES["tiny"])), zoo_rope_for_length("nemotron-nas", SIZES["tiny"], 4096)
    )
    assert SPEC.parse(longer).max_position_embeddings == 4096
    assert "auto_map" not in SPEC.hub_config(SPEC.parse(dict(SIZES["tiny"]) | {"auto_map": {"AutoConfig": "x.py"}}))
