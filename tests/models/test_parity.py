"""Logits and gradients of every family against transformers' own model in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.models.reference import FAMILIES, ROPES, draw_fields, family_of, gradients, pair, token_loss
from zoo.core.contracts import IGNORE

SEEDS = 24


def assert_logits_agree(found, expected):
    assert (found - expected).abs().max() <= 5e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_transformers(family, seed):
    fields = draw_fields(seed, family)
    theirs, ours = pair(fields, seed)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    expected = theirs(tokens).logits
    assert_logits_agree(ours(tokens), expected)

    found, reference = all_gradients(fields, ours, theirs, tokens)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_that_cancel_are_as_close_to_the_truth_as_transformers(family, seed):
    """With narrow weights a key's gradient is a small difference of large numbers; fp32 has few digits of it.

    There transformers itself is up to 2e-5 away from what fp64 says, and no fp32 could agree with it to 1e-5.
    """
    fields = draw_fields(seed, family) | {"initializer_range": 0.05}
    theirs, ours = pair(fields, seed)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    found, reference = all_gradients(fields, ours, theirs, tokens)
    ours.double().zero_grad()
    token_loss(ours, tokens, next_tokens(tokens)).backward()
    for name, truth in gradients(ours).items():
        error, theirs_error = ((found[name] - truth).norm(), (reference[name] - truth).norm())
        assert error <= max(1e-5 * truth.norm(), 1.5 * theirs_error), name


def all_gradients(fields, ours, theirs, tokens):
    """Gradients of the summed token losses by our names: ours, and transformers'."""
    labels = next_tokens(tokens)
    token_loss(ours, tokens, labels).backward()
    functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    found = {name: gradient.clone() for name, gradient in gradients(ours).items()}
    return found, family_of(fields).in_our_names(gradients(theirs))


def next_tokens(tokens):
    return torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORE)], 1)


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
        assert_logits_agree(ours(tokens), theirs(tokens).logits)
        short = ours(tokens[:, :40])
        assert torch.equal(short, ours(tokens[:, :40])), "a long call must leave nothing behind"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.routes])
def test_bfloat16_is_close_to_transformers(family, tmp_path):
    """Not where tokens choose experts: a choice that rounding flips changes more than any bound would allow."""
    fields = draw_fields(3, family)
    theirs, ours = pair(fields)
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    with torch.no_grad():
        logits, expected = ours.bfloat16()(tokens), theirs(tokens).logits
    assert logits.dtype is torch.bfloat16
    assert (logits - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_restart_like_transformers(family):
    fields = draw_fields(8, family) | {"sliding_window": None}
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 30))
    positions = torch.cat([torch.arange(7), torch.arange(23)]).expand(2, -1)
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        assert_logits_agree(ours(tokens, positions), expected)
        assert (ours(tokens) - expected).abs().max() > 1e-4
