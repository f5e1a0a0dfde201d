"""Sliding windows: transformers' Mistral and Ministral beside ours, and what a config.json says of them."""

from __future__ import annotations

import json
from inspect import signature

import pytest
import torch
from transformers import MinistralConfig, MinistralForCausalLM, MistralConfig, MistralForCausalLM

from tools.reference import check_fp32
from zoo.cli.main import main
from zoo.core.attention.seam import AttentionSeam
from zoo.core.errors import DataError
from zoo.core.model.load import ModuleSource, load_into
from zoo.core.model.seams import replace_modules
from zoo.core.sequence.mask import Mask
from zoo.models.common import AttentionCore
from zoo.models.llama3.config import hub_config, override, parse
from zoo.models.llama3.model import SPEC
from zoo.models.llama3.plugin import zoo_match_checkpoint
from zoo.plugins.attention.sdpa import Sdpa

FIELDS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def _pair(model_type, window):
    torch.manual_seed(0)
    more = {"sliding_window": window, "attn_implementation": "eager"}
    if model_type == "mistral":
        theirs = MistralForCausalLM(MistralConfig(**FIELDS, **more))
    else:
        theirs = MinistralForCausalLM(MinistralConfig(**FIELDS, **more, layer_types=ALTERNATING))
    ours = SPEC.build(SPEC.parse(json.loads(theirs.config.to_json_string())))
    load_into(ours, ModuleSource(theirs), ())
    return theirs.double(), ours.double()


@pytest.mark.parametrize("window", [1, 2, 5, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("model_type", ["mistral", "ministral"])
def test_logits_are_transformers_at_every_window(model_type, window):
    """To fp64 but for norms and rotation, which transformers computes in fp32.

    A window that is off by one changes a logit by 0.2. What the engine's seam computes is the same to fp64.
    """
    theirs, ours = _pair(model_type, window)
    tokens = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(1))
    rows = {"whole": tokens, "first": tokens[:, :20], "second": tokens[:, 20:]}
    with torch.no_grad():
        wanted = _logits(ours, rows)
        check_fp32(lambda: _logits(ours, rows), {name: theirs(row).logits for name, row in rows.items()})
        replace_modules(
            ours, "model.layers.*.self_attn.core", lambda old: AttentionSeam(Sdpa(), window=old.window), owner="test"
        )
        torch.testing.assert_close(ours(tokens), wanted["whole"], rtol=0, atol=1e-12)
        packed = Mask(64, ((0, 20), (20, 64)))
        positions = torch.cat([torch.arange(20), torch.arange(44)])[None].expand(2, -1)
        halves = torch.cat([wanted["first"], wanted["second"]], 1)
        torch.testing.assert_close(ours(tokens, positions, packed), halves, rtol=0, atol=1e-12)


def _logits(model, rows):
    return {name: model(row) for name, row in rows.items()}


def test_the_core_computes_long_rows_in_parts():
    """transformers rotates in fp32, which shows at angles of a thousand."""
    theirs, ours = _pair("mistral", 30)
    tokens = torch.randint(0, 97, (1, 1100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check_fp32(lambda: {"logits": ours(tokens)}, {"logits": theirs(tokens).logits})


def test_the_core_and_what_replaces_it_take_the_same_arguments():
    core, seam = (signature(kind.forward).parameters.values() for kind in (AttentionCore, AttentionSeam))
    assert [(p.name, p.kind) for p in core] == [(p.name, p.kind) for p in seam]


@pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_core_and_what_replaces_it_scale_scores_alike(window, scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 4, dtype=torch.float64) for heads in (4, 2, 2))
    found = AttentionCore(window)(q, k, v, None, scale=scale)
    torch.testing.assert_close(found, AttentionSeam(Sdpa(), window=window)(q, k, v, None, scale=scale))
    scores = (q * (0.5 if scale is None else scale)) @ k.repeat_interleave(2, 1).mT
    distance = torch.arange(9)[:, None] - torch.arange(9)
    hidden = (distance < 0) | (distance >= (window or 9))
    torch.testing.assert_close(found, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1))


def test_which_layers_have_which_window():
    llama = FIELDS | {"model_type": "llama", "sliding_window": 7}
    assert parse(llama).windows == (None, None, None), "transformers ignores it too"
    assert parse(FIELDS | {"model_type": "mistral"}).windows == (4096, 4096, 4096)
    assert parse(FIELDS | {"model_type": "mistral", "sliding_window": None}).windows == (None, None, None)
    mixed = FIELDS | {"model_type": "ministral", "sliding_window": 7, "layer_types": ALTERNATING}
    assert parse(mixed).windows == (7, None, 7)
    assert SPEC.windows(parse(mixed)) == (7, None, 7)
    for config in (llama, mixed, FIELDS | {"model_type": "mistral", "sliding_window": 9}):
        assert parse(hub_config(parse(config))) == parse(config)
        assert zoo_match_checkpoint(config) == "llama3"


def test_a_window_set_by_hand_makes_a_llama_a_mistral():
    fields = hub_config(parse(FIELDS | {"model_type": "llama"}))
    changed = override(fields, {"sliding_window": 16})
    assert (changed["model_type"], changed["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert parse(changed).windows == (16, 16, 16)
    changed = override(fields, {"sliding_window": 16, "layer_types": ALTERNATING})
    assert (changed["model_type"], parse(changed).windows) == ("ministral", (16, None, 16))
    assert parse(override(changed, {"sliding_window": 8})).windows == (8, None, 8)
    assert override(fields, {})["model_type"] == "llama"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, "it must list 3 of"),
        ({"layer_types": ALTERNATING}, "set model.sliding_window too"),
        ({"sliding_window": 8, "attention_bias": True}, "has no biases"),
    ],
)
def test_windows_that_cannot_be_are_refused(over, message):
    with pytest.raises(DataError, match=message):
        override(hub_config(parse(FIELDS | {"model_type": "llama"})), over)


def test_a_plan_of_windowed_layers_says_so(capsys):
    assert main(["plan", "llama3", "--size", "tiny", "--cp", "2", "--set", "model.sliding_window=64"]) == 0
    assert "halo for 2 layers of window 64 (" in capsys.readouterr().out
