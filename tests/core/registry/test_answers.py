"""A wrong answer of a plugin is one line: whose it is, which method, what came, what the contract says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.core.attention.formula import Formula
from zoo.core.attention.answers import check_cover
from zoo.core.attention.evaluate import attend, attend_backward
from zoo.core.attention.forecast import Rates, forecast
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import HeadShape, Stage
from zoo.core.contracts.batch import Batch
from zoo.core.contracts.checkpoints import HubCheckpoint
from zoo.core.contracts.data import Record, Remark, Sample
from zoo.core.contracts.entries import ModelEntry, ParallelAdapterEntry
from zoo.core.contracts.models import Losses, ParallelPlan
from zoo.core.contracts.parallel import Counts, Phase
from zoo.core.contracts.weights import Piece
from zoo.core.data.corpus import read_shard
from zoo.core.errors import PluginError
from zoo.core.model import answers as model_answers
from zoo.core.model.inventory import meta_model, rule_book
from zoo.core.model.load import ModuleSource
from zoo.core.model.rules import Rename, Stack
from zoo.core.registry import answers
from zoo.core.registry.checks import PluginProblem, gathered_entries
from zoo.core.run.forward_backward import OneByOne
from zoo.core.run.metrics import Meter, Pending
from zoo.core.run.step import StepResult
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.mixtral.model import SPEC as MIXTRAL
from zoo.plugins.context.ring import Ring

SMALL = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = HeadShape(num_heads=4, num_kv_heads=2, head_dim=8)


def refused(ask, *words):
    """Ask, and find every word in the one line of the error."""
    with pytest.raises(PluginError) as caught:
        ask()
    (line,) = str(caught.value).splitlines()
    for word in (*words, "the contract says"):
        assert word in line


# Kernels and schemes ------------------------------------------------------------------------------


class Kernel(Formula):
    """A right one, but for what is done to its results."""

    def __init__(self, forward=lambda *x: x, backward=lambda *x: x):
        super().__init__()
        self.changed = forward, backward

    def rectangle_forward(self, *args, **how):
        return self.changed[0](*super().rectangle_forward(*args, **how))

    def rectangle_backward(self, *args, **how):
        return self.changed[1](*super().rectangle_backward(*args, **how))


class Whole(Kernel):
    """The same without the driver of rectangles."""

    def forward(self, *args):
        return self.changed[0](*Formula.forward(Formula(), *args))

    def backward(self, *args):
        return self.changed[1](*Formula.backward(Formula(), *args))


def computed(kernel, documents=2, backward=False):
    """Attention of 6 tokens in so many documents: in one rectangle, or in stacked ones that are merged."""
    mask = Mask(6, tuple((i * 6 // documents, (i + 1) * 6 // documents) for i in range(documents)))
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    slices = local_slices(mask, ((0, 6),))
    out, lse = (x.to(q.dtype) for x in attend(kernel, q, k, v, slices, 1.0))
    return attend_backward(kernel, torch.ones_like(out), q, k, v, out, lse, slices, 1.0) if backward else (out, lse)


FORWARD = {
    "nothing": (lambda out, lse: None, "returned None"),
    "no lse": (lambda out, lse: out, "float32 ["),
    "a transposed out": (lambda out, lse: (out.transpose(1, 2), lse), "out float32 ["),
    "an out of another type": (lambda out, lse: (out.half(), lse), "out float16"),
    "an out elsewhere": (lambda out, lse: (out.to("meta"), lse), "on meta"),
    "an lse with a dim more": (lambda out, lse: (out, lse[..., None]), "lse float32 ["),
    "an lse in bfloat16": (lambda out, lse: (out, lse.bfloat16()), "lse bfloat16"),
}
BACKWARD = {
    "two gradients": (lambda dq, dk, dv: (dq, dk), "a tuple of 2"),
    "no gradient of v": (lambda dq, dk, dv: (dq, dk, None), "a tuple of 3"),
    "gradients of repeated heads": (lambda dq, dk, dv: (dq, dk.repeat(1, 2, 1, 1), dv), "dk float32 ["),
    "a gradient of one row": (lambda dq, dk, dv: (dq[:, :, :1], dk, dv), "dq float32 ["),
    "gradients in float16": (lambda dq, dk, dv: (dq, dk, dv.half()), "dv float16"),
}


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("kind", [Kernel, Whole])
@pytest.mark.parametrize("what", FORWARD)
def test_what_a_kernel_returns(what, kind, documents):
    change, came = FORWARD[what]
    method = "forward" if kind is Whole else "rectangle_forward"
    refused(lambda: computed(kind(change), documents), "attention backend 'formula'", method, came, "and lse [")


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("kind", [Kernel, Whole])
@pytest.mark.parametrize("what", BACKWARD)
def test_what_a_kernel_returns_backward(what, kind, documents):
    change, came = BACKWARD[what]
    method = "backward" if kind is Whole else "rectangle_backward"
    kernel = kind(backward=change)
    refused(lambda: computed(kernel, documents, backward=True), "attention backend 'formula'", method, came, "dk [")


@pytest.mark.parametrize("kind", [Kernel, Whole])
def test_a_kernel_may_be_more_exact_and_is_looked_at_once(kind):
    kernel = kind(lambda out, lse: (out.double(), lse.double()), lambda *grads: [g.double() for g in grads])
    computed(kernel, backward=True)
    # What would be refused in a first call is nobody's concern in a later one.
    kernel.changed = (lambda out, lse: (out, lse.bfloat16().float()), lambda *grads: grads)
    assert len(computed(kernel, backward=True)) == 3


class Scheme(Ring):
    """A ring of one rank, but for what is said otherwise."""

    name = "mine"

    def __init__(self, **said):
        self.said = said

    def plan(self, mask, layout, rank, heads):
        plan = super().plan(mask, layout, rank, heads)
        return self.said["plan"](plan) if "plan" in self.said else plan

    def forward(self, backend, plan, link, q, k, v, scale):
        return self.said.get("forward", lambda *x: x)(q.clone(), (q, k, q, q[..., 0]))

    def backward(self, backend, plan, link, dout, saved, scale):
        return self.said.get("backward", lambda *x: x)(dout, saved[1], saved[1])


def exchanged(scheme):
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)
    mask = ShardedMask(Mask.whole(12), SequenceLayout.contiguous(12, 2), 0)
    AttentionSeam(Formula(), Exchange(scheme=scheme, link=None))(q, k, k, mask).sum().backward()


@pytest.mark.parametrize(
    ("said", "method", "came"),
    [
        ({"plan": lambda plan: None}, "plan", "returned None"),
        ({"forward": lambda out, saved: out}, "forward", "float32 [1, 4, 6, 8]"),
        ({"forward": lambda out, saved: (out.double(), saved)}, "forward", "out float64"),
        ({"forward": lambda out, saved: (out[:, :, :3], saved)}, "forward", "out float32 [1, 4, 3, 8]"),
        ({"forward": lambda out, saved: (out, saved[1:2])}, "forward", "for backward a tuple of 1"),
        ({"forward": lambda out, saved: (out, (*saved[:3], saved[3].half()))}, "forward", "float16"),
        ({"backward": lambda dq, dk, dv: (dq, dk)}, "backward", "a tuple of 2"),
        ({"backward": lambda dq, dk, dv: (dq, dq, dv)}, "backward", "dk float32 [1, 4, 6, 8]"),
    ],
)
def test_what_a_scheme_returns(said, method, came):
    refused(lambda: exchanged(Scheme(**said)), "context scheme 'mine'", method, came)
    exchanged(Scheme())


@pytest.mark.parametrize(
    ("stages", "came"),
    [
        (None, "returned None"),
        (((Stage(1, 1),),), "a tuple of 1"),
        (((Stage(1, 1),), ()), "a tuple of 0"),
        (((Stage(-1, 1),), (Stage(1, 1),)), "sent=-1"),
        (((Stage(1, float("nan")),), (Stage(1, 1),)), "scores=nan"),
        (((3,), (4,)), "returned 3"),
    ],
)
def test_the_numbers_of_a_forecast(stages, came):
    scheme = Scheme(plan=lambda plan: SimpleNamespace(stages=lambda *sizes: stages))
    speed = Rates(flops=1.0, link=1.0, value_bytes=2, gradient_bytes=4)
    layout = SequenceLayout.contiguous(12, 2)
    refused(
        lambda: forecast(scheme, Mask.whole(12), layout, HEADS, speed), "context scheme 'mine'", "plan.stages", came
    )


def test_a_scheme_says_whether_it_splits_rows():
    scheme = Scheme()
    scheme.splits_rows = None
    refused(lambda: check_cover(scheme, Mask.whole(12), 2, HEADS), "'mine'", "splits_rows", "None")


def test_a_plan_covers_what_the_mask_lets_see_once():
    mask = Mask.whole(12)
    check_cover(Scheme(), mask, 2, HEADS)
    check_cover(Scheme(), mask.with_window(3), 4, HEADS)

    def without_a_slice(plan):
        return replace(plan, own=plan.own[1:])

    def one_twice(plan):
        return replace(plan, own=(*plan.own, *plan.own))

    for plan in (without_a_slice, one_twice):
        refused(
            lambda plan=plan: check_cover(Scheme(plan=plan), mask, 2, HEADS), "'mine'", "plan", "every visible pair"
        )


# Objects, answers of host methods -----------------------------------------------------------------


def offer(kind, name, target):
    """Entries of one kind of which one is given, as `Catalog` has them."""
    owner = SimpleNamespace(label="pico (zoo-pico 1.0)")
    entry = SimpleNamespace(axes=("dp_shard",))
    return SimpleNamespace(
        kind=kind, noun=f"noun of {kind}", load=lambda _name: target, owner=lambda _name: owner, get=lambda _name: entry
    )


def adapter(**said):
    return SimpleNamespace(**{"name": "mine", "axes": ("dp_shard",), "phase": Phase.WRAP} | said)


def test_what_a_tracker_can_do():
    assert answers.checked_tracker("mine", SimpleNamespace(log=len, close=len))
    for found in (None, SimpleNamespace(log=len), SimpleNamespace(log=len, close=3)):
        refused(lambda found=found: answers.checked_tracker("mine", found), "tracker 'mine'", "log and close")


def test_an_adapter_is_what_its_entry_says():
    entries = [ParallelAdapterEntry(name="mine", target="a:b", axes=("dp_shard",))]
    answers.check_adapter(adapter(), entries)
    for said, came in (({"axes": ("cp",)}, "('cp')"), ({"phase": 60}, "phase is 60")):
        refused(lambda said=said: answers.check_adapter(adapter(**said), entries), "parallel adapter", came)


@pytest.mark.parametrize("answer", [True, False, "", 3, ["no"]])
def test_a_reason_is_a_sentence_or_none(answer):
    assert answers.refusal("x", "supports", None) is None
    assert answers.refusal("x", "supports", "too wide") == "too wide"
    refused(lambda: answers.refusal("attention backend 'mine'", "supports", answer), "'mine'", "supports")


ADAPTER = SimpleNamespace(name="mine")


def test_what_an_adapter_answers():
    refused(lambda: answers.applies(ADAPTER, None), "parallel adapter 'mine'", "applies", "None")
    refused(lambda: answers.changed("memory policy 'mine'", None), "'mine'", "apply", "None", "the model")
    refused(lambda: answers.whole_parts(ADAPTER, "weights"), "'mine'", "whole", "weights, gradients, optimizer")
    refused(lambda: answers.whole_parts(ADAPTER, ["moments"]), "'mine'", "whole", "moments")
    refused(lambda: answers.check_order(ADAPTER, None), "'mine'", "forward_backward", "None")
    assert answers.applies(ADAPTER, False) is False
    assert answers.whole_parts(ADAPTER, ("weights",)) == {"weights"}


def test_what_shard_batch_returns():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens=ids, labels=ids, positions=ids, mask=None)
    answers.check_batch(ADAPTER, batch, replace(batch, tokens=ids[:, :2], labels=ids[:, :2], positions=ids[:, :2]))
    for after, came in (
        (None, "None"),
        (replace(batch, labels=ids[:, :2]), "labels int64 [1, 2]"),
        (replace(batch, tokens=ids.int()), "tokens int32"),
        (replace(batch, positions=ids[0]), "positions int64 [4]"),
    ):
        refused(lambda after=after: answers.check_batch(ADAPTER, batch, after), "'mine'", "shard_batch", came)


@pytest.mark.parametrize("answer", [None, -1, 1.5, float("nan"), True, "1"])
def test_bytes_of_a_memory_policy(answer):
    policy = SimpleNamespace(name="mine", saved_bytes=lambda *_: answer)
    refused(lambda: answers.saved_bytes(policy, None, 1, 2), "memory policy 'mine'", "saved_bytes", repr(answer))
    policy.saved_bytes = lambda *_: 0
    assert answers.saved_bytes(policy, None, 1, 2) == 0


def test_fields_for_a_length_are_those_of_the_family():
    by, known = SimpleNamespace(label="pico (zoo-pico 1.0)"), ("rope_theta", "rope_scaling")
    answers.check_fields(by, {"rope_theta": 1e6}, known)
    refused(
        lambda: answers.check_fields(by, {"rope_thetas": 1e6}, known),
        *("pico (zoo-pico 1.0)", "zoo_rope_for_length", "'rope_thetas'", "did you mean 'rope_theta'?"),
    )


# Checkpoints and data -----------------------------------------------------------------------------


class Source(ModuleSource):
    """The tensors of a module, but for what is said otherwise."""

    def __init__(self, **said):
        super().__init__(torch.nn.Linear(2, 3))
        for name, answer in said.items():
            object.__setattr__(self, name, lambda *_, answer=answer: answer)


def checkpoint(**said):
    return HubCheckpoint(path=Path(), config={}, tensors=Source(**said), files=())


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        (None, "None"),
        (replace(checkpoint(), config=None), "HubCheckpoint"),
        (replace(checkpoint(), tensors=None), "without names"),
        (checkpoint(names=("a", "b", "a")), "'a' twice"),
        (checkpoint(names="weight"), "'weight'"),
        (checkpoint(names=iter(["a"])), "names()"),
        (checkpoint(shape=None), "shape('weight') is None"),
        (checkpoint(shape=(-1, 2)), "(-1, 2)"),
        (checkpoint(dtype="F32"), "'F32'"),
    ],
)
def test_what_a_converter_opens(answer, came):
    converter = SimpleNamespace(name="mine", open=lambda _path: answer)
    refused(lambda: answers.opened(converter, Path()), "checkpoint format 'mine'", "open", came)
    assert answers.opened(SimpleNamespace(name="mine", open=lambda _path: checkpoint()), Path()).files == ()


def test_where_a_converter_finds_a_checkpoint():
    converter = SimpleNamespace(name="mine", locate=str)
    refused(lambda: answers.located(converter, "a/b"), "checkpoint format 'mine'", "locate", "'a/b'", "a Path")
    assert answers.located(SimpleNamespace(name="mine", locate=Path), "a/b") == Path("a/b")


RECORD = Record({"text": "a"}, "a.jsonl:3")


@pytest.mark.parametrize(
    ("sample", "came"),
    [
        (None, "returned None"),
        ((x for x in ()), "a generator"),
        ({"tokens": [1], "trained": [True]}, "type dict"),
        (Sample([1, 32], [True, True]), "token id 32"),
        (Sample([1, -1], [True, True]), "token id -1"),
        (Sample([1.5], [True]), "tokens [1.5"),
        (Sample(["7"], [True]), "tokens ['7'"),
        (Sample([[1, 2]], [[True, False]]), "tokens [a list"),
        (Sample((i for i in (1, 2)), [True, True]), "a generator"),
        (Sample([2**70], [True]), "tokens ["),
        (Sample([1, 2], [True]), "2 tokens and 1 marks"),
        (Sample([1, 2], [0, 2]), "trained [0, 2"),
        (Sample([1, 2], ["no", "yes"]), "trained ['no'"),
        (Sample([1], [True], ["odd"]), "remarks a list of 1"),
    ],
)
def test_what_a_data_format_makes_of_a_record(sample, came):
    words = ("data format 'mine'", "a.jsonl:3", came)
    refused(lambda: answers.sample_arrays("mine", RECORD, sample, 32), *words)


def test_samples_of_the_contract_are_taken():
    for tokens, trained in (([1, 31], [True, False]), (torch.tensor([1, 31]), [1, 0]), ((1, 31), torch.tensor([1, 0]))):
        ids, marks = answers.sample_arrays("mine", RECORD, Sample(tokens, trained, [Remark("odd")]), 32)
        assert (ids.tolist(), marks.tolist(), str(ids.dtype)) == ([1, 31], [True, False], "int32")
    assert not len(answers.sample_arrays("mine", RECORD, Sample([], []), 32)[0])


def corpus(**said):
    return SimpleNamespace(**{"fingerprint": "f", "shards": lambda: ["s"], "read": lambda *_: iter(())} | said)


@pytest.mark.parametrize(
    ("source", "came"),
    [
        ("data.txt", "'data.txt' without shards"),
        (corpus(read=None), "without read"),
        (corpus(fingerprint=3), "a fingerprint 3"),
        (corpus(shards=lambda: "s"), "shards() are 's'"),
        (corpus(shards=lambda: iter(["s"])), "shards()"),
        (corpus(shards=lambda: [Path("s")]), "shards()"),
    ],
)
def test_what_opens_data(source, came):
    by = SimpleNamespace(label="pico (zoo-pico 1.0)")
    refused(lambda: answers.check_source(by, source), "pico (zoo-pico 1.0)", "zoo_open_data", came)
    answers.check_source(by, corpus())


@pytest.mark.parametrize("answer", [RECORD, (RECORD, None), (RECORD, 0), ({"text": "a"}, 1), (Record("a", ""), 1)])
def test_what_a_corpus_reads(answer):
    refused(lambda: next(read_shard(corpus(read=lambda *_: iter([answer])), "s", 0)), "data source", "read")
    assert list(read_shard(corpus(read=lambda *_: iter([(RECORD, 1)])), "s", 0)) == [(RECORD, 1)]
    assert list(read_shard(corpus(), "s", 0)) == []


# Models -------------------------------------------------------------------------------------------


def spec(of=LLAMA, **said):
    """A family, but for what is said otherwise."""
    return replace(of, **{name: lambda *_, answer=answer: answer for name, answer in said.items()})


def said_of(spec, fields=SMALL):
    config = model_answers.parsed(spec, fields)
    return model_answers.told(spec, config, meta_model(spec, config))


PLAN = LLAMA.plan(None)
ATTENTION = PLAN.seams["attention"]
SHAPE = HeadShape(num_heads=2, num_kv_heads=2, head_dim=4)


@pytest.mark.parametrize(
    ("said", "method", "came"),
    [
        ({"parse": None}, "parse", "None"),
        ({"parse": SimpleNamespace(vocab_size=32, hidden_size=0)}, "parse", "hidden_size 0"),
        ({"build": None}, "build", "None"),
        ({"plan": None}, "plan", "None"),
        ({"plan": replace(PLAN, block="model.layer.*")}, "plan", "'model.layer.*'"),
        ({"plan": replace(PLAN, tensor={"lm_head": "colwize"})}, "plan", "did you mean 'colwise'"),
        ({"plan": replace(PLAN, tensor={"model.layers.*": "colwise"})}, "plan", "model.layers.0 has none"),
        ({"plan": replace(PLAN, tensor={"model.head": "vocab"})}, "plan", "'model.head'"),
        ({"plan": replace(PLAN, seams={**PLAN.seams, "losses": "loss"})}, "plan", "did you mean 'loss'"),
        ({"plan": replace(PLAN, seams={**PLAN.seams, "mlp": "model.layers.*.mlp"})}, "plan", "without parameters"),
        ({"plan": ParallelPlan(block="model.layers.*")}, "plan", "no seam 'attention'"),
        ({"plan": replace(PLAN, expert=("model.layers.*.mlp",))}, "experts", "None"),
        ({"windows": [None]}, "windows", "1 entries"),
        ({"windows": [None, 0]}, "windows", "returned 0"),
        ({"windows": None}, "windows", "None"),
        ({"windows": [None, 16]}, "windows", "16 for attention layer 1"),
        ({"heads": [SHAPE] * 3}, "heads", "3 entries"),
        ({"heads": [(2, 2, 4)] * 2}, "heads", "(2, 2, 4)"),
        ({"heads": [replace(SHAPE, num_kv_heads=0)] * 2}, "heads", "num_kv_heads=0"),
        ({"flops_per_token": None}, "flops_per_token", "None"),
        ({"flops_per_token": float("nan")}, "flops_per_token", "nan"),
        ({"experts": 8}, "experts", "returned 8"),
    ],
)
def test_what_a_family_says_of_its_model(said, method, came):
    refused(lambda: said_of(spec(**said)), "model 'llama3'", method, came)


def test_families_of_the_contract_are_believed():
    assert said_of(LLAMA).heads == (SHAPE, SHAPE)
    mixture = SMALL | {"num_local_experts": 4, "num_key_value_heads": 2}
    assert said_of(MIXTRAL, mixture).experts.num_experts == 4
    fewer = replace(said_of(MIXTRAL, mixture).experts, num_experts=3)
    refused(lambda: said_of(spec(MIXTRAL, experts=fewer), mixture), "model 'mixtral'", "experts", "3 experts")


def test_a_target_that_is_no_spec():
    refused(lambda: model_answers.loaded_spec(offer("models", "mine", dict), "mine"), "model 'mine'", "a ModelSpec")
    refused(
        lambda: model_answers.loaded_spec(offer("models", "mine", LLAMA), "mine"), "'llama3'", "of the entry, 'mine'"
    )
    broken = offer("models", "llama3", replace(LLAMA, windows=None))
    refused(lambda: model_answers.loaded_spec(broken, "llama3"), "windows as None", "a function")
    assert model_answers.loaded_spec(offer("models", "llama3", LLAMA), "llama3") is LLAMA


class Half:
    """A rule that fills half of a tensor."""

    ours = "lm_head.weight"

    def pieces(self, atoms, shape):
        return (Piece("lm_head.weight", (0, 0), (shape[0] // 2, shape[1])),)


@pytest.mark.parametrize(
    ("rules", "came"),
    [
        (None, "None"),
        (("lm_head",), "a tuple of 1"),
        ((Rename(ours="model.norm.weigth", hub="norm"),), "model.norm.weigth matches no parameter"),
        ((Rename(ours="model.norm.weight", hub="lm_head.weight"),), "take lm_head.weight twice"),
        ((Rename(ours="lm_head.weight", hub="a"), Rename(ours="lm_head.{i}", hub="b")), "both match lm_head.weight"),
        ((Stack(ours="lm_head.weight", hub="lm_head.{i}.{j}"),), "exactly one atom"),
        ((Half(),), "[16, 8] at [0, 0] for lm_head.weight [32, 8]"),
    ],
)
def test_rules_use_every_tensor_once(rules, came):
    config = LLAMA.parse(SMALL | {"tie_word_embeddings": False})
    refused(lambda: rule_book(spec(rules=rules), config), "model 'llama3'", "rules", came)
    right = (Rename(ours="model.norm.weight", hub="norm"),)
    assert "norm" in rule_book(spec(rules=right), config).hub_shapes


class Returning(torch.nn.Module):
    """A model that returns with labels what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, *_):
        return self.answer(self.weight * 2)


def stepped(answer, steps=1):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens=ids, labels=ids, positions=ids, mask=None, document_tokens=4)
    order = OneByOne(family="mine")
    return [order.run(Returning(answer), [batch], Counts(4, 1, 4)) for _ in range(steps)][-1]


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        (lambda loss: None, "None"),
        (lambda loss: (loss, {}), "a tuple of 2"),
        (lambda loss: loss.expand(4), "float32 [4]"),
        (lambda loss: loss.detach(), "float32 []"),
        (lambda loss: Losses(loss, loss.expand(2)), "rows float32 [2]"),
        (lambda loss: Losses(loss, None), "rows None"),
        (lambda loss: Losses(loss, 0.0, {"loss": loss.detach()}), "'loss' in report"),
        (lambda loss: Losses(loss, 0.0, {}, {"step_s": loss.detach()}), "'step_s' in token_report"),
        (lambda loss: Losses(loss, 0.0, {"load": 0.5}), "'load' as 0.5"),
        (lambda loss: Losses(loss, 0.0, {"load": loss}), "with a gradient"),
        (lambda loss: Losses(loss, 0.0, {"load": torch.ones(2, 2)}), "float32 [2, 2]"),
        (lambda loss: Losses(loss, 0.0, {"load": loss.detach()}, {"load": loss.detach()}), "'load' in report and"),
        (lambda loss: Losses(loss, 0.0, [loss]), "report a list of 1"),
    ],
)
def test_what_a_model_returns_with_labels(answer, came):
    refused(lambda: stepped(answer), "model 'mine'", "forward with labels", came)


def test_losses_of_the_contract_are_taken():
    assert stepped(lambda loss: loss, steps=2).loss == 0.5
    assert stepped(lambda loss: Losses(loss, loss, {"load": torch.ones(2)}, {"z": torch.tensor(1)})).report.keys() == {
        "load",
        "z",
    }


def test_the_names_that_models_must_not_take_are_those_of_zoo(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    meter = Meter(seq=4, global_batch=1, world_size=1, peak_tflops=1.0, device=torch.device("cpu"))
    meter.add(Pending(1, StepResult(torch.ones(()), torch.ones(()), 0.1), 4, 1.0, 0.0))
    assert meter.flush()[0].keys() == model_answers.OWN_METRICS


@pytest.mark.parametrize(
    ("said", "came"),
    [
        ({"parameters": {"tiny": "1b"}}, "'1b' parameters"),
        ({"parameters": {"large": 10}}, "no size 'large', which its parameters names"),
        ({"kv_heads": {"tiny": [2, 0]}}, "kv_heads [2, 0]"),
        ({"kv_heads": {"tiny": [2, 2, 2]}}, "at most 2"),
        ({"recipes": ["optim.lr"]}, "recipes"),
    ],
)
def test_what_an_entry_of_a_family_lists(said, came):
    def entries(**said):
        entry = ModelEntry(name="mine", target="a:b", model_type="llama", sizes={"tiny": SMALL}, default_size="tiny")
        return gathered_entries({"zoo_register_models": lambda: [replace(entry, **said)]})

    with pytest.raises(PluginProblem, match="model 'mine'") as caught:
        entries(**said)
    assert came in str(caught.value)
    assert entries(parameters={"tiny": 10}, kv_heads={"tiny": [2, 1]})["models"]
    listed = replace(entries()["models"][0], kv_heads={"tiny": [2, 1]})
    refused(lambda: model_answers.check_kv_heads(LLAMA, listed, "tiny", LLAMA.parse(SMALL)), "'mine'", "[2, 2]")
