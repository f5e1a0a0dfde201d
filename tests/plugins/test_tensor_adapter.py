"""The `tensor` adapter: what it refuses, its loss against the plain one, and state that goes from one tp to another."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tests.harness import layouts
from zoo.cli.main import main
from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.batch import IGNORE
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.contracts.models import ExpertShape, ParallelPlan
from zoo.core.errors import UsageError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.mesh.mesh import Mesh
from zoo.core.model.inventory import cut_widths
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import share_of
from zoo.models.common.loss import TokenLoss
from zoo.plugins.parallel.tensor import ranks as tensor_ranks
from zoo.plugins.parallel.tensor.adapter import TensorParallel
from zoo.plugins.parallel.tensor.loss import VocabularyLoss
from zoo.plugins.parallel.tensor.modules import VocabularyHead
from zoo.plugins.parallel.tensor.ranks import TensorRanks, add_up
from zoo.testing import ranks

WIDTHS = (("model.layers.*.mlp.gate_proj", 24), ("lm_head", 128_256))


def request(*heads, tp=2, widths=WIDTHS, experts=None, **more):
    shapes = [HeadShape(num_heads=n, num_kv_heads=g, head_dim=4) for n, g in heads]
    facts = ModelFacts(name="llama3", layer_heads=shapes, widths=widths, experts=experts)
    return Layout(degrees=Degrees(tp=tp), seq=64, settings=LayoutSection(**more), model=facts)


EXPERTS = ExpertShape(num_experts=4, hidden_size=16, intermediate_size=24)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (request((32, 8), tp=8), None),
        (request((32, 8), tp=3), ["--tp 3 does not divide the 32 query heads of llama3"]),
        (request((12, 4), tp=6), ["--tp 6", "4 key/value heads"]),
        (request((8, 8), (8, 2), tp=4), ["--tp 4", "2 key/value heads"]),
        (request((16, 16), tp=16), ["--tp 16", "24 rows or columns of model.layers.*.mlp.gate_proj"]),
        (request((8, 8), tp=2, widths=(("lm_head", 128_257),)), ["--tp 2", "128,257", "lm_head"]),
        (request((8, 8), widths=()), ["--tp 2", "names none"]),
        (request((8, 8), experts=EXPERTS), None),
        (request((8, 8), experts=EXPERTS, sequence_parallel=False), ["layout.sequence_parallel=false", "2 times"]),
    ],
)
def test_what_tp_does_not_divide_is_refused(layout, words):
    said = TensorParallel().check(layout)
    assert (said is None) == (words is None), said
    for word in words or ():
        assert word in said


def test_kernels_and_schemes_are_asked_about_the_heads_of_a_rank():
    problems = request((32, 8), (32, 4), tp=4).problems
    assert [(p.num_heads, p.num_kv_heads) for p in problems] == [(8, 2), (8, 1)]


def test_widths_are_those_of_the_plan_each_once():
    spec, _ = layouts.MODELS["nemotron-nas"]
    layer = "model.layers.*"
    expected = [("model.embed_tokens", 24), ("lm_head", 24)]
    expected += [(f"{layer}.self_attn.{name}_proj", 32) for name in "qkvo"]
    expected += [(f"{layer}.self_attn.{name}_proj", 16) for name in "kv"]
    expected += [(f"{layer}.mlp.{name}_proj", width) for name in ("gate", "up", "down") for width in (24, 8, 16)]
    assert sorted(cut_widths(spec, layouts.config("nemotron-nas"))) == sorted(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_tokens_are_dealt_out_in_order_and_in_whole(size):
    for length in range(12):
        shares = [share_of(length, rank, size) for rank in range(size)]
        assert sum(shares) == length
        assert shares == sorted(shares, reverse=True)


def test_the_length_of_a_row_is_its_masks_wherever_its_tokens_were_embedded():
    second = TensorRanks(SimpleNamespace(rank=lambda: 1, size=lambda: 4), sequence=True)
    second.watch(None, (torch.ones(1), Mask.whole(26)))
    assert second._whole_length(7) == 26
    # A piece of the row, of which every rank has as much.
    assert second._whole_length(5) == 20


# On ranks -----------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """A module that its plan says to cut, and that nobody knows how to."""

    def __init__(self, module):
        super().__init__()
        self.part = module


def refusals():
    """On a rank: what is said of plans that cannot be followed."""
    mesh = Mesh(Degrees(tp=1), "cpu")
    layout = Layout(seq=8, dtype="float64")
    said = []
    for module, style in (
        (nn.Bilinear(2, 2, 2), "colwise"),
        (nn.Embedding(4, 2, padding_idx=0), "vocab"),
        (nn.Linear(2, 4), "vocab"),
    ):
        with pytest.raises(UsageError) as error:
            TensorParallel().apply(Unusual(module), ParallelPlan(block="part", tensor={"part": style}), mesh, layout)
        said.append(str(error.value))
    return said


def others():
    """On a rank: whether a module that the plan does not cut stays, where it also cuts what is not here."""
    mesh = Mesh(Degrees(tp=1), "cpu")
    layout = Layout(seq=8, dtype="float64")
    plan, module = ParallelPlan(block="part", tensor={"part": "colwise", "head": "vocab"}), nn.Identity()
    kept = [TensorParallel().apply(Unusual(module), plan, mesh, layout).part is module]
    plan, module = ParallelPlan(block="part"), nn.MultiheadAttention(2, 1)
    kept.append(TensorParallel().apply(Unusual(module), plan, mesh, layout).part is module)
    return kept


@pytest.mark.dist
def test_a_plan_that_cannot_be_followed_is_refused():
    said = ranks.run(1, refusals)[0]
    words = "Bilinear is no linear layer", "padding_idx", "no seam 'loss'"
    for sentence, word in zip(said, words, strict=True):
        assert word in sentence


@pytest.mark.dist
def test_what_is_not_here_is_not_cut_and_what_is_not_cut_stays_as_it_is():
    assert ranks.run(1, others)[0] == [True, True]


KINDS = (((3, 5), torch.float32), ((), torch.float64), ((4, 7), torch.bfloat16), ((0, 2), torch.float32))
"""Shapes and dtypes, of what is sent as four values a message."""


def sums():
    """On a rank: tensors of its own, some of them views with gaps, and their sums over ranks."""
    torch.manual_seed(dist.get_rank())
    own = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in KINDS * 2]
    spaced = torch.randn(6, 2, dtype=torch.float64)
    added = [*(tensor.clone() for tensor in own), spaced.clone()[:, 1]]
    with mock.patch.object(tensor_ranks, "_MESSAGE_VALUES", 4):
        add_up(added, dist.group.WORLD)
    return [*own, spaced[:, 1].clone()], added


@pytest.mark.dist
def test_parts_of_gradients_add_up_whatever_goes_together():
    found = ranks.run(3, sums)
    for parts, added in zip(*(zip(*tensors, strict=True) for tensors in zip(*found, strict=True)), strict=True):
        wanted = sum(part.double() for part in parts).to(parts[0].dtype)
        for value in added:
            torch.testing.assert_close(value, wanted)


def losses(sequence):
    """On a rank: loss and gradients of a cut head and of the plain one, and logits of both."""
    torch.manual_seed(1)
    rank, size, rows, width, words = dist.get_rank(), dist.get_world_size(), 150, 6, 20
    hidden, weight = torch.randn(1, rows, width).double(), torch.randn(words, width).double()
    # Logits in the hundreds: only a softmax that takes the largest of all ranks away stays finite.
    weight[3] *= 300
    labels = torch.randint(0, words, (1, rows))
    labels[0, ::7] = IGNORE
    group = dist.group.WORLD
    each = -(-rows // size)
    mine = slice(rank * each, (rank + 1) * each) if sequence else slice(None)
    results = []
    for cut in (True, False):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        if cut:
            ranks_of_tp = TensorRanks(group, sequence=sequence)
            mesh = Mesh(Degrees(tp=size), "cpu")["tp"]
            local = nn.Parameter(DTensor.from_local(w.detach().chunk(size)[rank], mesh, [Shard(0)]))
            part = h.detach()[:, mine].clone().requires_grad_()
            total = VocabularyLoss(ranks_of_tp)(part, local, labels)
            (total * 0.5).backward()
            gradients = part.grad, local.grad.to_local()
            logits = VocabularyHead(ranks_of_tp, {"weight": local, "bias": None})(part)
            total = total.detach().clone()
            dist.all_reduce(total)
        else:
            total = TokenLoss()(h, w, labels)
            (total * 0.5).backward()
            gradients = h.grad[:, mine], w.grad.chunk(size)[rank]
            logits = nn.functional.linear(h, w)
        results.append([x.detach() for x in (total, *gradients, logits)])
    return results


@pytest.mark.dist
@pytest.mark.parametrize("sequence", [True, False])
def test_a_head_cut_by_words_has_the_loss_and_the_gradients_of_the_plain_one(sequence):
    for cut, plain in ranks.run(4, losses, sequence):
        for value, wanted in zip(cut, plain, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def saved(folder, chosen):
    """On a rank: a save of what nobody has trained."""
    run = layouts.Run(chosen)
    spec, _ = layouts.MODELS[chosen.model]
    hub = {"config.json": json.dumps(spec.hub_config(chosen.config)).encode()}
    Checkpoints(folder, keep=1).save(run.state, {"step": run.state.step}, hub)


@pytest.mark.dist
def test_the_bytes_of_an_export_do_not_depend_on_tp(tmp_path):
    files = []
    for words in ("tp2 dp_shard2", "tp4", "dp_shard4"):
        run = tmp_path / str(len(files))
        ranks.run(4, saved, run, layouts.choose("llama", words))
        main(["export", str(run), "--to", "hf", str(run / "hf")])
        files.append({file.name: file.read_bytes() for file in Path(run / "hf").glob("*.safetensors")})
    assert files[0]
    assert files[0] == files[1] == files[2]


def in_bfloat16(chosen):
    """On a rank: numbers of a step whose arithmetic is bfloat16 and whose weights are not, and how some are placed."""
    run = layouts.Run(chosen)
    numbers = {name: value.float() for name, value in run.step().items()}
    placed = {name: str(getattr(p, "placements", None)) for name, p in run.model.named_parameters()}
    return numbers, placed, {p.dtype for p in run.model.parameters()}


@pytest.mark.dist
def test_mixed_precision_is_the_same_at_any_tp_but_for_rounding():
    one, _, _ = ranks.run(1, in_bfloat16, layouts.choose("llama", "bf16"))[0]
    four, placed, dtypes = ranks.run(4, in_bfloat16, layouts.choose("llama", "tp2 cp2 bf16"))[0]
    assert dtypes == {torch.float32}
    layer = "model.layers.0.self_attn"
    assert placed[f"{layer}.q_proj.weight"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    assert placed[f"{layer}.o_proj.weight"] == "(Shard(dim=0), Shard(dim=1))"
    assert placed[f"{layer}.o_proj.bias"] == "(Shard(dim=0),)"
    for name, value in four.items():
        torch.testing.assert_close(value, one[name], rtol=2e-2, atol=2e-2)
