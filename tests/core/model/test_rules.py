"""Rules: any piece of any tensor of ours equals the same piece of what is built of the hub's, and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from zoo.core.errors import DataError
from zoo.core.model.rules import Concat, Part, Rename, RuleBook, Stack, row_blocks, whole

RULES = (
    Rename(ours="model.layers.{i}.router.weight", hub="model.layers.{i}.gate.weight"),
    Stack(ours="model.layers.{i}.experts.w1", hub="model.layers.{i}.experts.{e}.w1.weight"),
    Concat(ours="model.layers.{i}.qkv", hub=("l.{i}.q", "l.{i}.k", "l.{i}.v"), sizes=(4, 2, 1)),
    Concat(ours="wide", hub=("left", "right"), sizes=(3, 2), dim=1),
    Part(ours="moe.{i}.w3", hub="moe.{i}.gate_up", dim=1, start=2, total=5),
    Part(ours="moe.{i}.w1", hub="moe.{i}.gate_up", dim=1, start=0, total=5),
)
SHAPES = {
    "model.embed.weight": (6, 4),
    "model.layers.0.router.weight": (3, 4),
    "model.layers.10.router.weight": (3, 4),
    "model.layers.0.experts.w1": (3, 5, 4),
    "model.layers.0.qkv": (7, 4),
    "wide": (2, 5),
    "moe.0.w1": (3, 2, 4),
    "moe.0.w3": (3, 3, 4),
}


class Memory:
    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def read(self, name, index, buffer=None):
        assert len(index) == self.tensors[name].ndim
        assert all(0 <= i.start <= i.stop <= size for i, size in zip(index, self.tensors[name].shape, strict=True))
        return self.tensors[name][index]


@pytest.fixture(scope="module")
def book():
    return RuleBook(RULES, SHAPES)


@pytest.fixture(scope="module")
def hub(book):
    torch.manual_seed(0)
    return Memory({name: torch.randn(shape) for name, shape in book.hub_shapes.items()})


def test_names_and_shapes_of_the_hub(book):
    assert book.hub_shapes == {
        "model.embed.weight": (6, 4),
        "model.layers.0.gate.weight": (3, 4),
        "model.layers.10.gate.weight": (3, 4),
        "model.layers.0.experts.0.w1.weight": (5, 4),
        "model.layers.0.experts.1.w1.weight": (5, 4),
        "model.layers.0.experts.2.w1.weight": (5, 4),
        "l.0.q": (4, 4),
        "l.0.k": (2, 4),
        "l.0.v": (1, 4),
        "left": (2, 3),
        "right": (2, 2),
        "moe.0.gate_up": (3, 5, 4),
    }


def test_what_is_built(book, hub):
    ours, of = book.to_ours(hub), hub.tensors
    built = {name: ours.read(name, whole(SHAPES[name])) for name in ours.names()}
    experts = [of[f"model.layers.0.experts.{e}.w1.weight"] for e in range(3)]
    assert torch.equal(built["model.layers.0.experts.w1"], torch.stack(experts))
    assert torch.equal(built["model.layers.0.qkv"], torch.cat([of["l.0.q"], of["l.0.k"], of["l.0.v"]]))
    assert torch.equal(built["wide"], torch.cat([of["left"], of["right"]], 1))
    assert torch.equal(built["moe.0.w1"], of["moe.0.gate_up"][:, :2])
    assert torch.equal(built["moe.0.w3"], of["moe.0.gate_up"][:, 2:])
    assert torch.equal(built["model.layers.10.router.weight"], of["model.layers.10.gate.weight"])
    assert torch.equal(built["model.embed.weight"], of["model.embed.weight"])


def draw_index(data, shape):
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    return tuple(index)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_piece_in_either_direction(book, hub, data):
    ours = book.to_ours(hub)
    memory = Memory({name: ours.read(name, whole(shape)) for name, shape in SHAPES.items()})
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    index = draw_index(data, SHAPES[name])
    assert torch.equal(ours.read(name, index), memory.tensors[name][index])

    back = book.to_hub(memory)
    name = data.draw(st.sampled_from(sorted(back.names())))
    index = draw_index(data, back.shape(name))
    assert torch.equal(back.read(name, index), hub.tensors[name][index])


def test_dtypes_follow_the_source():
    book = RuleBook(RULES[1:2], {"model.layers.0.experts.w1": (2, 1, 1)})
    hub = Memory({name: torch.zeros(1, 1, dtype=torch.bfloat16) for name in book.hub_shapes})
    assert book.to_ours(hub).dtype("model.layers.0.experts.w1") == "bfloat16"
    assert book.to_ours(hub).read("model.layers.0.experts.w1", whole((2, 1, 1))).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rename(ours="wide", hub="model.embed.weight"),), "take model.embed.weight twice"),
        ((Rename(ours="wide", hub="a"), Rename(ours="{x}", hub="b")), "both match wide"),
        ((Rename(ours="nothing.{i}", hub="a.{i}"),), "matches no parameter"),
        ((Stack(ours="wide", hub="no.atom"),), "exactly one atom"),
        ((Part(ours="wide", hub="a", dim=1, start=0, total=6),), "leave a part of a unused"),
        (
            (
                Part(ours="moe.{i}.w1", hub="a", dim=1, start=0, total=5),
                Part(ours="moe.{i}.w3", hub="a", dim=1, start=1, total=5),
            ),
            "take a twice: for moe.0.w1 and moe.0.w3",
        ),
        (
            (
                Part(ours="moe.{i}.w1", hub="a", dim=1, start=0, total=5),
                Part(ours="moe.{i}.w3", hub="a", dim=1, start=2, total=6),
            ),
            "disagree about the shape of a",
        ),
    ],
)
def test_rules_that_contradict_each_other(rules, message):
    with pytest.raises(ValueError, match=message):
        _ = RuleBook(rules, SHAPES).hub_shapes


def test_pieces_that_do_not_add_up():
    with pytest.raises(DataError, match="wide has 5 rows and not 3 \\+ 3"):
        RuleBook((Concat(ours="wide", hub=("a", "b"), sizes=(3, 3), dim=1),), SHAPES)
    with pytest.raises(DataError, match="wide has 5 rows, which do not fit into 6 at 2"):
        RuleBook((Part(ours="wide", hub="a", dim=1, start=2, total=6),), SHAPES)


def test_an_atom_is_never_two():
    book = RuleBook((), {"a.b.c": (1,)})
    assert list(book.hub_shapes) == ["a.b.c"]
    with pytest.raises(ValueError, match="matches no parameter"):
        RuleBook((Rename(ours="a.{i}", hub="x.{i}"),), {"a.b.c": (1,)})


@given(shape=st.lists(st.integers(0, 9), max_size=3), values=st.integers(1, 30))
def test_row_blocks_cover_an_index_once_and_in_order(shape, values):
    numbers = torch.arange(math.prod(shape)).view(shape)
    blocks = [numbers[block].flatten() for block in row_blocks(whole(tuple(shape)), values=values)]
    assert all(block.numel() <= values for block in blocks)
    assert torch.equal(torch.cat([*blocks, torch.zeros(0, dtype=torch.int64)]), numbers.flatten())
