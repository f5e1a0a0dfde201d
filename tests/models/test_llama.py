"""The built Llama as the engine sees it: plan, seams, names, meta build, initialisation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.reference import draw_fields
from zoo.core.contracts import AttentionProblem, LayoutRequest
from zoo.core.errors import UsageError
from zoo.core.seams import find, swap
from zoo.core.weights import ModuleSource, allocate, load_into
from zoo.models.llama3.config import parse
from zoo.models.llama3.model import SPEC
from zoo.models.llama3.plugin import zoo_check_layout, zoo_match_checkpoint


def build(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return SPEC.build(parse(draw_fields(seed) | changes))


@pytest.mark.parametrize("seed", range(6))
def test_names_and_shapes_are_the_hubs(seed):
    fields = draw_fields(seed)
    with torch.device("meta"):
        ours, theirs = SPEC.build(parse(fields)), LlamaForCausalLM(LlamaConfig(**fields))
    shapes = [{name: parameter.shape for name, parameter in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_every_glob_of_the_plan_matches_and_every_seam_is_parameterless():
    model, plan = build(), SPEC.plan(parse(draw_fields(0)))
    for glob in (plan.block, *plan.tensor, *plan.first, *plan.last):
        find(model, glob)
    for glob in plan.seams.values():
        for name in find(model, glob):
            assert not list(model.get_submodule(name).parameters())
    cut = {name for glob in plan.tensor for name in find(model, glob)}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert owners <= cut, "every parameter is in a module that the plan speaks of"


def test_each_seam_is_really_used():
    called = []

    class Spy(nn.Module):
        def __init__(self, seam: str, old: nn.Module) -> None:
            super().__init__()
            self.seam, self.old = seam, old

        def forward(self, *args):
            called.append(self.seam)
            return self.old(*args)

    model, plan = build(num_hidden_layers=2), SPEC.plan(parse(draw_fields(0)))
    tokens = torch.randint(0, 97, (1, 8))
    before = model(tokens, labels=tokens)
    for seam, glob in plan.seams.items():
        swap(model, glob, lambda old, seam=seam: Spy(seam, old), owner="test")
    assert torch.equal(model(tokens, labels=tokens), before)
    assert {seam: called.count(seam) for seam in plan.seams} == {"attention": 2, "block": 2, "mlp": 2, "loss": 1}


def test_the_mask_reaches_the_attention_seam_untouched():
    class Core(nn.Module):
        def forward(self, q, k, v, mask):
            seen.append(mask)
            return q

    seen, mask = [], object()
    model = build(num_hidden_layers=2)
    swap(model, "model.layers.*.self_attn.core", lambda _old: Core(), owner="test")
    model(torch.zeros(1, 4, dtype=torch.int64), mask=mask)
    assert seen == [mask, mask]


def test_a_mask_without_the_engines_seam_is_refused():
    with pytest.raises(UsageError, match="mask=None"):
        build()(torch.zeros(1, 4, dtype=torch.int64), mask=object())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_parameter(tied):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


@pytest.mark.parametrize("seed", range(5))
def test_a_model_built_on_meta_becomes_the_one_built_directly(seed):
    config = parse(draw_fields(seed))
    direct = build(seed)
    with torch.device("meta"):
        model = SPEC.build(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    allocate(model, torch.device("cpu"))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    SPEC.init_buffers(model, config)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    load_into(model, ModuleSource(direct), ())
    tokens = torch.randint(0, config.vocab_size, (1, 20))
    assert torch.equal(model(tokens), direct(tokens))


def test_a_seed_fixes_the_weights_and_their_spread():
    fields = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1000, "attention_bias": True}
    first, second, other = build(0, **fields), build(0, **fields), build(1, **fields)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert abs(first.model.embed_tokens.weight.std().item() - 0.05) < 1e-3
    assert abs(first.model.layers["0"].self_attn.q_proj.weight.std().item() - 0.05) < 2e-3
    assert first.model.layers["0"].self_attn.q_proj.bias.abs().max() == 0
    assert first.model.norm.weight.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_in_is_dtype_out(dtype):
    model = build().to(dtype)
    tokens = torch.randint(0, 97, (1, 8))
    assert model(tokens).dtype is dtype
    assert model(tokens, labels=tokens).dtype is torch.promote_types(dtype, torch.float32)


def test_fp64_is_computed_in_fp64():
    """The same tokens in two places of a row: what fp32 angles would blur at 1e-8 must agree to 1e-13."""
    model = build(3, num_hidden_layers=1).double()
    tokens = torch.randint(0, 97, (1, 33))
    whole = model(tokens)
    for stop in range(1, 33):
        torch.testing.assert_close(model(tokens[:, :stop]), whole[:, :stop], rtol=1e-12, atol=1e-13)


def test_flops_count_every_matrix_product_of_a_forward_three_times():
    fields = draw_fields(5) | {"attention_bias": False, "mlp_bias": False}
    config = parse(fields)
    with torch.device("meta"):
        model = SPEC.build(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    matrices = weights if config.tie_word_embeddings else weights - config.vocab_size * config.hidden_size
    assert SPEC.flops_per_token(config, 0.0) == 6 * matrices
    keys = SPEC.flops_per_token(config, 10.0) - SPEC.flops_per_token(config, 0.0)
    assert keys == 3 * 4 * 10 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def test_dynamic_rope_on_several_ranks_is_refused_beyond_the_native_length():
    def objection(rope: str, seq: int, cp: int) -> str | None:
        config = parse({"max_position_embeddings": 1024, "rope_scaling": {"rope_type": rope, "factor": 2.0}})
        problem = AttentionProblem(device="cpu", dtype="float32", head_dim=128, num_heads=32, num_kv_heads=32)
        degrees = {"cp": cp, "dp_shard": 1}
        return zoo_check_layout(LayoutRequest(degrees=degrees, seq=seq, model="llama3", config=config, problem=problem))

    assert "yarn or linear" in objection("dynamic", 2048, 2)
    assert objection("dynamic", 1024, 2) is None
    assert objection("dynamic", 2048, 1) is None
    assert objection("linear", 2048, 2) is None


def test_the_family_is_known_by_its_model_type():
    assert zoo_match_checkpoint({"model_type": "llama"}) == "llama3"
    assert zoo_match_checkpoint({"model_type": "mixtral"}) is None
    assert zoo_match_checkpoint({}) is None


@pytest.mark.parametrize("module", ["zoo.models.llama3.plugin", "zoo.conversion.plugin"])
def test_plugin_modules_import_without_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'numpy', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
