"""Logits and gradients against transformers' LlamaForCausalLM in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.models.reference import ROPES, draw_fields, pair
from zoo.core.contracts import IGNORE


@pytest.mark.parametrize("seed", range(24))
def test_logits_and_gradients_are_transformers(seed):
    fields = draw_fields(seed)
    theirs, ours = pair(fields, seed)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    logits, expected = ours(tokens), theirs(tokens).logits
    assert (logits - expected).abs().max() <= 5e-6 * max(1.0, expected.abs().max().item())

    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE)], 1)
    ours(tokens, labels=labels).backward()
    functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    found, reference = gradients_by_module(ours), gradients_by_module(theirs)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def gradients_by_module(model):
    """Weight and bias of a module as one vector: the gradient of a key's bias alone is little but rounding."""
    return {
        name: torch.cat([parameter.grad.flatten() for parameter in module.parameters(recurse=False)])
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def test_the_drawn_configs_cover_what_they_should():
    drawn = [draw_fields(seed) for seed in range(24)]
    assert {fields["rope_parameters"]["rope_type"] for fields in drawn} == set(ROPES)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {fields[key] for fields in drawn} == {True, False}
    assert any(fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"] for fields in drawn)
    assert any(fields["num_key_value_heads"] < fields["num_attention_heads"] for fields in drawn)


def test_dynamic_rope_beyond_the_native_length_is_transformers():
    fields = draw_fields(2) | {"max_position_embeddings": 48}
    assert fields["rope_parameters"]["rope_type"] == "dynamic"
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (1, 130))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens) - expected).abs().max() <= 5e-6 * max(1.0, expected.abs().max().item())
        short = ours(tokens[:, :40])
        assert torch.equal(short, ours(tokens[:, :40])), "a long call must leave nothing behind"


def test_bfloat16_is_close_to_transformers(tmp_path):
    fields = draw_fields(3)
    theirs, ours = pair(fields)
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(0, fields["vocab_size"], (2, 100))
    with torch.no_grad():
        logits, expected = ours.bfloat16()(tokens), theirs(tokens).logits
    assert logits.dtype is torch.bfloat16
    assert (logits - expected).abs().max() <= 0.03 * expected.abs().max()


def test_positions_restart_like_transformers():
    fields = draw_fields(8)
    theirs, ours = pair(fields)
    tokens = torch.randint(0, fields["vocab_size"], (2, 30))
    positions = torch.cat([torch.arange(7), torch.arange(23)]).expand(2, -1)
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        assert (ours(tokens, positions) - expected).abs().max() <= 5e-6 * max(1.0, expected.abs().max().item())
        assert (ours(tokens) - expected).abs().max() > 1e-4
