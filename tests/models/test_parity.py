"""Logits and gradients of every family against transformers' own model in fp32: as near to fp64 as fp32 can be."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tools.reference import (
    FAMILIES,
    ROPES,
    check_fp32,
    check_logits,
    draw_fields,
    family_of,
    gradients,
    pair,
    token_loss,
)
from tools.rounding import rounding
from zoo.core.contracts.batch import IGNORE

SEEDS = 24


@pytest.mark.parametrize("width", [0.1, 0.05])
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_transformers(family, seed, width):
    """Both are off from our fp64 by no more than fp32 may be.

    With narrow weights a key's gradient is a small difference of large numbers; fp32 has few digits of it, ours and
    transformers' not the same ones. How few, the data say.
    """
    fields = draw_fields(seed, family) | {"initializer_range": width}
    theirs, ours = pair(fields, seed)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORE)], 1)
    found, expected = results(ours, tokens, labels), {"logits": theirs(tokens).logits}
    functional.cross_entropy(expected["logits"].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected |= family_of(fields).in_our_names(gradients(theirs))
    assert found.keys() == expected.keys()
    check_fp32(lambda: results(ours.double(), tokens, labels), found, expected)


def results(ours, tokens, labels):
    """Logits, and gradients of the summed token losses by name."""
    ours.zero_grad()
    token_loss(ours, tokens, labels).backward()
    return {"logits": ours(tokens), **{name: gradient.clone() for name, gradient in gradients(ours).items()}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drawn_configs_cover_what_they_should(family):
    drawn = [draw_fields(seed, family) for seed in range(SEEDS)]
    assert {fields["rope_parameters"]["rope_type"] for fields in drawn} == set(ROPES)
    for key in ("tie_word_embeddings", *FAMILIES[family].varied):
        assert len({fields[key] for fields in drawn}) > 1
    assert any(fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"] for fields in drawn)
    assert any(fields["num_key_value_heads"] < fields["num_attention_heads"] for fields in drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_rope_beyond_the_native_length_is_transformers(family):
    fields = draw_fields(2, family) | {"max_position_embeddings": 48}
    assert fields["rope_parameters"]["rope_type"] == "dynamic"
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (1, 130))
    with torch.no_grad():
        short = ours(tokens[:, :40])
        ours(tokens)
        assert torch.equal(short, ours(tokens[:, :40])), "a long call must leave nothing behind"
        check_logits(ours, theirs(tokens).logits, tokens)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.routes])
def test_bfloat16_is_close_to_transformers(family, tmp_path):
    """Not where tokens choose experts: a choice that rounding flips changes more than any bound would allow.

    Processors keep the sums of a bfloat16 product in fp32.
    """
    fields = draw_fields(3, family)
    theirs, ours = pair(fields)
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    with torch.no_grad():
        logits, expected = ours.bfloat16()(tokens), theirs(tokens).logits
        assert logits.dtype is torch.bfloat16
        share = rounding(lambda: {"logits": ours.double()(tokens)}, torch.bfloat16, sums=torch.float32)
    assert share("logits", logits) <= 1
    assert share("logits", expected) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_restart_like_transformers(family):
    fields = draw_fields(8, family) | {"sliding_window": None}
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 30))
    positions = torch.cat([torch.arange(7), torch.arange(23)]).expand(2, -1)
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        share = check_logits(ours, expected, tokens, positions)
        assert share("logits", ours(tokens)) > 100, "positions that go on are something else"
