"""The built model of each family as the engine sees it: plan, seams, names, meta build, initialisation."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from tools.reference import FAMILIES, draw_fields, token_loss
from zoo.core.contracts.globs import find_modules
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.errors import UsageError
from zoo.core.mesh.degrees import Degrees
from zoo.core.model.load import ModuleSource, allocate, load_into
from zoo.core.model.seams import replace_modules

every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str = "llama3", seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    spec = FAMILIES[family].spec
    return spec.build(spec.parse(draw_fields(seed, family) | changes))


def module_of(family: str, name: str):
    return importlib.import_module(f"zoo.models.{family}.{name}")


@pytest.mark.parametrize("seed", range(6))
@every_family
def test_names_and_shapes_are_the_hubs(family, seed):
    fields, known = draw_fields(seed, family), FAMILIES[family]
    with torch.device("meta"):
        ours, theirs = known.spec.build(known.spec.parse(fields)), known.model(known.config(**fields))
    expected = known.in_our_names(dict(theirs.named_parameters()))
    shapes = [{n: p.shape for n, p in named} for named in (ours.named_parameters(), expected.items())]
    assert shapes[0] == shapes[1]


@every_family
def test_every_glob_of_the_plan_matches_and_every_seam_is_parameterless(family):
    spec = FAMILIES[family].spec
    model, plan = build(family), spec.plan(spec.parse(draw_fields(0, family)))
    for glob in (plan.block, *plan.tensor, *plan.expert, *plan.first, *plan.last):
        find_modules(model, glob)
    for glob in plan.seams.values():
        for name in find_modules(model, glob):
            assert not list(model.get_submodule(name).parameters())
    cut = {name for glob in (*plan.tensor, *plan.expert, *FAMILIES[family].whole) for name in find_modules(model, glob)}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert owners <= cut, "every parameter is in a module that the plan speaks of"


@every_family
def test_each_seam_is_really_used(family):
    called = []

    class Spy(nn.Module):
        def __init__(self, seam: str, old: nn.Module) -> None:
            super().__init__()
            self.seam, self.old = seam, old

        def forward(self, *args):
            called.append(self.seam)
            return self.old(*args)

    spec = FAMILIES[family].spec
    model, plan = build(family, num_hidden_layers=2), spec.plan(spec.parse(draw_fields(0, family)))
    tokens = torch.randint(0, 97, (1, 8))
    before = token_loss(model, tokens, tokens)
    for seam, glob in plan.seams.items():
        replace_modules(model, glob, lambda old, seam=seam: Spy(seam, old), owner="test")
    assert torch.equal(token_loss(model, tokens, tokens), before)
    once = {"loss", "layer_sum", "row_sum", "row_part"}
    assert all(called.count(seam) == 1 for seam in plan.seams.keys() & once)
    assert all(called.count(seam) >= 2 for seam in plan.seams.keys() - once)


@every_family
def test_the_mask_reaches_the_attention_seam_untouched(family):
    class Core(nn.Module):
        def forward(self, q, k, v, mask):
            seen.append(mask)
            return q

    seen, mask = [], object()
    model = build(family, num_hidden_layers=2)
    replace_modules(model, "model.layers.*.self_attn.core", lambda _old: Core(), owner="test")
    model(torch.zeros(1, 4, dtype=torch.int64), mask=mask)
    assert seen == [mask, mask]


def test_a_mask_without_the_engines_seam_is_refused():
    with pytest.raises(UsageError, match="mask=None"):
        build()(torch.zeros(1, 4, dtype=torch.int64), mask=object())


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_tied_embeddings_are_one_parameter(family, tied):
    model = build(family, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


@pytest.mark.parametrize("seed", range(5))
@every_family
def test_a_model_built_on_meta_becomes_the_one_built_directly(family, seed):
    spec = FAMILIES[family].spec
    config = spec.parse(draw_fields(seed, family))
    direct = build(family, seed)
    with torch.device("meta"):
        model = spec.build(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    allocate(model, torch.device("cpu"))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    spec.init_buffers(model, config)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    load_into(model, ModuleSource(direct), ())
    tokens = torch.randint(0, config.vocab_size, (1, 20))
    assert torch.equal(model(tokens), direct(tokens))


@every_family
def test_a_seed_fixes_the_weights_and_their_spread(family):
    fields = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000}
    first, second, other = (build(family, seed, **fields, initializer_range=0.05) for seed in (0, 0, 3))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert abs(first.model.embed_tokens.weight.std().item() - 0.05) < 1e-3
    assert abs(first.model.layers["0"].self_attn.q_proj.weight.std().item() - 0.05) < 2e-3
    for name, parameter in first.named_parameters():
        if "norm" in name or name.endswith("bias"):
            # A norm's stored weight is its scale, or how much that is above 1.
            assert len(parameter.unique()) == 1
        else:
            assert abs(parameter.std().item() - 0.05) < 5e-3, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_family
def test_dtype_in_is_dtype_out(family, dtype):
    model = build(family).to(dtype)
    tokens = torch.randint(0, 97, (1, 8))
    assert model(tokens).dtype is dtype
    assert token_loss(model, tokens, tokens).dtype is torch.promote_types(dtype, torch.float32)


@every_family
def test_fp64_is_computed_in_fp64(family):
    """The same tokens in two places of a row: what fp32 angles would blur at 1e-8 must agree to 1e-13."""
    model = build(family, 3, num_hidden_layers=1).double()
    tokens = torch.randint(0, 97, (1, 33))
    whole = model(tokens)
    for stop in range(1, 33):
        torch.testing.assert_close(model(tokens[:, :stop]), whole[:, :stop], rtol=1e-12, atol=1e-13)


@every_family
def test_flops_count_every_matrix_product_of_a_forward_three_times(family):
    spec = FAMILIES[family].spec
    config = spec.parse(draw_fields(5, family))
    with torch.device("meta"):
        model = spec.build(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    # Of stacked experts, those that a token meets.
    weights += sum(p[: config.num_experts_per_tok].numel() for p in model.parameters() if p.ndim == 3)
    matrices = weights if config.tie_word_embeddings else weights - config.vocab_size * config.hidden_size
    assert spec.flops_per_token(config, 0.0) == 6 * matrices
    keys = spec.flops_per_token(config, 10.0) - spec.flops_per_token(config, 0.0)
    assert keys == 3 * 4 * 10 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


@every_family
def test_dynamic_rope_on_several_ranks_is_refused_beyond_the_native_length(family):
    check = module_of(family, "plugin").zoo_check_layout

    def objection(rope: str, seq: int, cp: int) -> str | None:
        config = FAMILIES[family].spec.parse(
            {"max_position_embeddings": 1024, "rope_scaling": {"rope_type": rope, "factor": 2.0}}
        )
        degrees = Degrees(cp=cp)
        return check(Layout(degrees=degrees, seq=seq, model=ModelFacts(name=family, config=config)))

    assert "yarn or linear" in objection("dynamic", 2048, 2)
    assert objection("dynamic", 1024, 2) is None
    assert objection("dynamic", 2048, 1) is None
    assert objection("linear", 2048, 2) is None


@every_family
def test_the_family_is_known_by_its_model_type(family):
    match = module_of(family, "plugin").zoo_match_checkpoint
    for other in FAMILIES:
        assert match({"model_type": FAMILIES[other].spec.model_type}) == (family if other == family else None)
    assert match({}) is None


def test_plugin_modules_import_without_torch():
    modules = ", ".join(["zoo.conversion.plugin", *(f"zoo.models.{family}.plugin" for family in FAMILIES)])
    code = f"import sys, {modules}; assert not {{'torch', 'numpy', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
