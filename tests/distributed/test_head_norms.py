"""Norms of query and key heads under `tp`: each rank has its own heads, so gradients of their weights are parts.

Layouts are compared with one process in fp64, as in test_layout_matrix, by tests/harness/layouts.py.
"""

from __future__ import annotations

from unittest import mock

import pytest

from tests.harness import layouts
from tests.harness.head_norms import NORMS, normed
from zoo.core.errors import LayoutError
from zoo.core.model.inventory import meta_model
from zoo.core.model.tensor_styles import style_objection, unnamed_module
from zoo.plugins.parallel.tensor.adapter import TensorParallel
from zoo.testing import ranks

DENSE, SPARSE = "dense-head-norms", "sparse-head-norms"


@pytest.mark.dist
@pytest.mark.parametrize(
    "words",
    [
        "tp2",
        "tp2 no-sp",
        "tp4 no-sp recompute",
        "tp2 cp2 no-sp ulysses",
        "tp2 dp_shard2 zero1 no-sp",
        "tp2 dp_replicate2 ddp no-sp",
        "pp2 tp2 no-sp",
        "tp2 cp2 recompute",
        "pp2 tp2 dp_shard2 no-sp interleaved",
    ],
)
def test_a_norm_of_heads_equals_one_process(words):
    layouts.check([DENSE], words)


@pytest.mark.dist
@pytest.mark.parametrize("words", ["cp2 ep2", "tp2 dp_shard2 ep2", "pp2 cp2 tp2 ep2"])
def test_a_norm_of_heads_beside_experts_equals_one_process(words):
    layouts.check([SPARSE], words)


def unsummed(cases):
    """On a rank: what differs where nobody adds up gradients over `tp`."""
    with mock.patch.object(TensorParallel, "complete_gradients", return_value=None):
        return layouts.compared(cases)


@pytest.mark.dist
def test_without_the_sum_over_ranks_every_number_after_the_first_step_is_off():
    chosen = layouts.choose(DENSE, "tp2 no-sp")
    for differences, _ in ranks.run(2, unsummed, [(chosen, layouts.wanted(chosen))])[0]:
        assert any(sentence.startswith("1.grad_norm") for sentence in differences)
        assert any("q_norm" in sentence for sentence in differences)


# What a plan says wrongly -------------------------------------------------------------------------


def said_of(styles):
    """Return what is said of a family whose plan gives these styles to modules; None if it is taken."""
    spec = normed(layouts.MODELS["llama"][0], "wrong", **styles)
    config = layouts.config("llama")
    return style_objection(
        meta_model(spec, config),
        spec.plan(config),
        name="wrong",
        hidden_size=config.hidden_size,
        head_dims={config.head_dim},
    )


def left_out_by(styles):
    spec = normed(layouts.MODELS["llama"][0], "wrong", **styles)
    config = layouts.config("llama")
    return unnamed_module(meta_model(spec, config), spec.plan(config))


def test_the_styles_of_norms_are_compared_with_their_widths():
    assert said_of(dict.fromkeys(NORMS, "heads")) is None
    said = said_of(dict.fromkeys(NORMS, "sequence"))
    assert "'model.layers.0.self_attn.q_norm' sequence" in said
    assert "([4]) is the hidden size, 16" in said
    assert "`heads` what works on each head" in said
    said = said_of({"model.norm": "heads"})
    assert "'model.norm' heads" in said
    assert "([16]) is the head size, 4" in said


def test_the_first_module_that_a_plan_does_not_name_is_found():
    assert left_out_by(dict.fromkeys(NORMS, "heads")) is None
    assert left_out_by({NORMS[0]: "heads"}) == "model.layers.0.self_attn.k_norm"


@pytest.mark.parametrize(("style", "words"), [("sequence", "tp2"), ("sequence", "tp2 no-sp"), (None, "tp2 no-sp")])
def test_a_wrong_plan_is_refused_before_anything_starts(style, words):
    styles = {NORMS[0]: "heads"} | ({NORMS[1]: style} if style else {})
    wrong = normed(layouts.MODELS["llama"][0], DENSE, **styles)
    lookup = type(layouts.registry().models)
    with mock.patch.object(lookup, "load", loading(DENSE, wrong)), pytest.raises(LayoutError) as caught:
        layouts.prepared(DENSE, words)
    said = str(caught.value)
    assert "k_norm" in said
    assert "nearest that works: " in said


def loading(name, spec):
    """`Catalog.load` for which a family has another spec."""
    real = type(layouts.registry().models).load
    return lambda lookup, wanted: spec if wanted == name else real(lookup, wanted)
