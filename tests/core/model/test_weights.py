"""Loading: only this rank's slices, in any placement, strictly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from zoo.core.errors import DataError
from zoo.core.model import inventory
from zoo.core.model.inventory import rules_for, tied_names
from zoo.core.model.load import ModuleSource, allocate, load_into
from zoo.core.model.rules import Part, Stack


class Toy(nn.Module):
    """A matrix with an odd number of rows, a stack, a vector, and a tied matrix."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 6)
        self.experts = nn.Parameter(torch.randn(4, 3, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight


class Memory(dict):
    """A dict of tensors as a source, which notes what is read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = []

    def __str__(self):
        return "DIR"

    def names(self):
        return self.keys()

    def shape(self, name):
        return tuple(self[name].shape)

    def dtype(self, name):
        return str(self[name].dtype).removeprefix("torch.")

    def read(self, name, index, buffer=None):
        self.reads.append((name, index))
        return self[name][index]


RULES = (Stack(ours="experts", hub="experts.{e}"),)


def stored(seed: int = 1) -> Memory:
    toy = Toy(seed=seed)
    tensors = {name: p.detach().clone() for name, p in toy.named_parameters() if name != "experts"}
    return Memory(tensors | {f"experts.{e}": toy.experts[e].detach().clone() for e in range(4)})


def test_every_parameter_is_filled_in_its_own_dtype():
    toy, source = Toy().double(), stored()
    load_into(toy, source, RULES)
    assert torch.equal(toy.embed.weight, source["embed.weight"].double())
    assert torch.equal(toy.experts[2], source["experts.2"].double())
    assert toy.head.weight is toy.embed.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.bias"), ("DIR lacks norm.bias",)),
        (lambda s: s.pop("experts.3"), ("lacks experts.3",)),
        (lambda s: s.update(more=torch.ones(1)), ("DIR has more", "no place")),
        (lambda s: s.update({"norm.bias": torch.ones(7)}), ("norm.bias is [7] and not [6]",)),
        (lambda s: s.update({f"x{i}": torch.ones(1) for i in range(9)}), ("x0, x1, x2, x3, x4 and 4 more",)),
        (lambda s: s.update({"head.weight": torch.ones(7, 6)}), ("head.weight differs from embed.weight", "--set")),
        (lambda s: s.update({"head.weight": torch.ones(7, 5)}), ("head.weight differs from embed.weight",)),
    ],
)
def test_anything_else_is_refused_and_named(change, words):
    source = stored()
    change(source)
    with pytest.raises(DataError) as error:
        load_into(Toy(), source, RULES)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_tied_tensor_may_be_there_twice_if_it_is_the_same():
    source = stored()
    source["head.weight"] = source["embed.weight"].clone()
    load_into(Toy(), source, RULES)
    assert tied_names(Toy()) == {"head.weight": "embed.weight"}


def fused() -> Memory:
    """The same weights as `stored`, all experts in one tensor."""
    source = stored()
    source["all"] = torch.stack([source.pop(f"experts.{e}") for e in range(4)])
    return source


class Forms:
    """What of a ModelSpec a form is chosen by: experts apart, or all in one tensor under another name."""

    build = staticmethod(lambda _config: Toy())
    rules = staticmethod(lambda _config: RULES)
    forms = staticmethod(lambda _config: ((Part(ours="experts", hub="all", dim=0, start=0, total=4),),))


@pytest.mark.parametrize("source", [stored(), fused()], ids=["apart", "fused"])
def test_the_names_tell_the_form(source):
    toy = Toy()
    load_into(toy, source, rules_for(Forms, None, source))
    assert torch.equal(toy.experts, Toy(seed=1).experts)


def test_errors_speak_of_the_form_that_fits_best():
    source = fused()
    del source["norm.weight"]
    with pytest.raises(DataError, match=r"^DIR lacks norm\.weight, which"):
        load_into(Toy(), source, rules_for(Forms, None, source))


def test_old_frequencies_are_ignored():
    source = stored()
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    load_into(Toy(), source, RULES)


def test_large_tensors_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr(inventory, "BLOCK_VALUES", 13)
    toy, source = Toy(), stored()
    load_into(toy, source, RULES)
    assert torch.equal(toy.embed.weight, source["embed.weight"])
    assert all(source[name][index].numel() <= 18 for name, index in source.reads)


@pytest.fixture
def group():
    """A rank of a pretended group: placements are computed as if the others were there, nothing is sent."""

    def start(rank: int, world_size: int):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


PLACEMENTS = [
    (Shard(0), Replicate()),
    (Replicate(), Shard(1)),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Replicate(), Replicate()),
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("rank", range(6))
def test_a_rank_reads_exactly_its_shard(group, placements, rank):
    group(rank, 6)
    # torch caches what it derives from a mesh; names of its own keep a rank from meeting another's.
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=(f"rows{rank}", f"columns{rank}"))
    toy, source = Toy(), stored()
    for owner, name in ((toy.embed, "weight"), (toy, "experts")):
        whole = torch.full_like(getattr(owner, name), float("nan")).detach()
        sharded = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        owner.register_parameter(name, nn.Parameter(sharded))
    toy.head.weight = toy.embed.weight
    load_into(toy, source, RULES)

    stack = torch.stack([source[f"experts.{e}"] for e in range(4)])
    for parameter, full in ((toy.embed.weight, source["embed.weight"]), (toy.experts, stack)):
        expected = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
        assert torch.equal(parameter.to_local(), expected)
    read = sum(source[name][index].numel() for name, index in source.reads if "norm" not in name)
    assert read == toy.embed.weight.to_local().numel() + toy.experts.to_local().numel()


def test_tied_weights_survive_fsdp_on_meta(group):
    from torch.distributed.fsdp import fully_shard

    from zoo.models.llama3.model import SPEC

    group(1, 3)
    config = SPEC.parse({"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                         "num_attention_heads": 4, "tie_word_embeddings": True})  # fmt: skip
    direct = SPEC.build(config)
    with torch.device("meta"):
        model = SPEC.build(config)
    fully_shard(model.model.layers["0"])
    fully_shard(model)
    allocate(model, torch.device("cpu"))
    SPEC.init_buffers(model, config)
    load_into(model, ModuleSource(direct), ())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.to_local(), direct.lm_head.weight[33:66])
    tokens = torch.randint(0, 97, (1, 8))
    model(tokens, labels=tokens).backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.grad is not None
