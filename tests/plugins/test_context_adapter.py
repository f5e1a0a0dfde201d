"""The `context` adapter: a model cut over `cp` computes the same loss and gradients, sharded and recomputed or not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from zoo.core.attention.seam import AttentionSeam
from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.batch import Batch
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.contracts.models import ParallelPlan
from zoo.core.errors import UsageError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.row_layout import row_layout
from zoo.plugins.attention.sdpa import Sdpa
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.halo import Halo
from zoo.plugins.context.hybrid import Hybrid
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ulysses import Ulysses
from zoo.plugins.parallel.context import plugin as context_plugin
from zoo.plugins.parallel.context.adapter import ContextParallel
from zoo.testing import ranks

PLAN = ParallelPlan(block="blocks.*", seams={"attention": "blocks.*.core"})
HEADS, GROUPS, SIZE, LENGTH = 4, 2, 8, 64


WINDOWS = (None, 9)
"""Of the two layers."""
SCHEMES = (
    {None: Ring(), 9: Halo()},
    {None: Allgather(), 9: Ring()},
    {None: Ulysses(), 9: Allgather()},
    {None: Hybrid(2), 9: Ulysses()},
)


class Block(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.qkv = nn.Linear(HEADS * SIZE, (HEADS + 2 * GROUPS) * SIZE)
        self.core = AttentionSeam(Sdpa(), window=window)

    def forward(self, h, mask, recompute):
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in self.qkv(h).split([32, 16, 16], -1))
        run = (lambda *a: checkpoint(self.core, *a, use_reentrant=False)) if recompute else self.core
        return h + run(q, k, v, mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, HEADS * SIZE)
        self.blocks = nn.ModuleList(map(Block, WINDOWS))

    def forward(self, batch, recompute=False):
        h = self.embed(batch.tokens) + torch.sin(batch.positions[..., None] / 9.0)
        for block in self.blocks:
            h = block(h, batch.mask, recompute)
        weight = (batch.labels >= 0) / 10.0
        return (h.square().sum(-1) * weight).sum()


def _batch(length=LENGTH, seed=0):
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (1, length)))
    cuts = [0, 10, 45, min(60, length - 2)]
    documents = tuple(zip(cuts, cuts[1:]))  # the last tokens are padding
    positions = torch.cat([torch.arange(b - a) for a, b in (*documents, (cuts[-1], length))])[None]
    labels = torch.where(torch.arange(length) % 3 == 0, -100, tokens)
    return Batch(tokens=tokens, labels=labels, positions=positions, mask=Mask(length, documents))


def _layout(schemes, **changes):
    settings = LayoutSection(**{f"cp_{name}": value for name, value in changes.items()})
    facts = ModelFacts(layer_windows=WINDOWS)
    return Layout(seq=LENGTH, schemes=schemes or {}, settings=settings, dtype="float64", model=facts)


def _model():
    torch.manual_seed(1)
    return Model().double()


def _step(model, batch, recompute=False):
    loss = model(batch, recompute)
    loss.backward()
    return loss.detach()


def _on_a_rank(layout, length, sharded, recompute):
    """The summed loss and gradients, and the schemes that seams were given."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    adapter, model = ContextParallel(), _model()
    names = [name for name, _ in model.named_parameters()]
    model = adapter.apply(model, PLAN, _Mesh(mesh), layout)
    if sharded:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        for module in filter(lambda m: isinstance(m, FSDPModule), model.modules()):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    assert [name for name, _ in model.named_parameters()] == names
    loss = _step(model, adapter.shard_batch(_batch(length), _Mesh(mesh), layout), recompute)
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
    for total in (loss, *(() if sharded else grads)):
        dist.all_reduce(total)
    return loss, grads, [m.exchange.scheme.name for m in model.modules() if isinstance(m, AttentionSeam)]


class _Mesh:
    """core's mesh as adapters see it."""

    device_type = "cpu"

    def __init__(self, mesh):
        self._mesh = mesh

    def __getitem__(self, axis):
        assert axis == "cp"
        return self._mesh


def _check_same(schemes, length, answers, tolerance=1e-10):
    model = _model()
    wanted = _step(model, _batch(length))
    for loss, grads, names in answers:
        torch.testing.assert_close(loss, wanted, rtol=1e-12 if tolerance < 1e-6 else tolerance, atol=0)
        assert names == [schemes[window].name for window in WINDOWS]
        for got, parameter in zip(grads, model.parameters()):
            scale = 1.0 if tolerance < 1e-6 else parameter.grad.abs().max().item()
            torch.testing.assert_close(got, parameter.grad, rtol=0, atol=tolerance * scale)


def _title(part):
    return "+".join(scheme.name for scheme in part.values()) if isinstance(part, dict) else None


@pytest.mark.dist
@pytest.mark.parametrize("schemes", SCHEMES, ids=_title)
@pytest.mark.parametrize(("sharded", "recompute"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("world", [2, 4])
def test_a_cut_model_is_the_same_function(world, schemes, sharded, recompute):
    _check_same(schemes, LENGTH, ranks.run(world, _on_a_rank, _layout(schemes), LENGTH, sharded, recompute))


@pytest.mark.dist
@pytest.mark.parametrize("balance", ["auto", "head-tail", "contiguous"])
@pytest.mark.parametrize("schemes", SCHEMES[:3], ids=_title)
def test_no_length_has_to_be_a_multiple_of_anything(schemes, balance):
    for world, length in ((4, 61), (3, 64)):
        layout = _layout(schemes, balance=balance)
        _check_same(schemes, length, ranks.run(world, _on_a_rank, layout, length, False, False))


@pytest.mark.dist
@pytest.mark.parametrize("schemes", SCHEMES, ids=_title)
def test_numbers_may_travel_in_a_narrower_type(schemes):
    """fp64 arithmetic over an fp32 wire is good to fp32, and no better: so it did travel in fp32."""
    answers = ranks.run(2, _on_a_rank, _layout(schemes, wire="float32"), LENGTH, False, False)
    _check_same(schemes, LENGTH, answers, tolerance=1e-5)
    with pytest.raises(AssertionError):
        _check_same(schemes, LENGTH, answers)


def _shard(adapter, batch, rank, layout, size=2):
    cp = SimpleNamespace(get_local_rank=lambda: rank, size=lambda: size)
    return adapter.shard_batch(batch, {"cp": cp}, layout)


@pytest.mark.parametrize("length", [64, 61])
@pytest.mark.parametrize("balance", ["auto", "head-tail", "balanced", "contiguous"])
def test_a_batch_is_cut_by_the_rows_layout(balance, length):
    layout, whole = _layout(SCHEMES[0], balance=balance), _batch(length)
    parts = [_shard(ContextParallel(), whole, rank, layout) for rank in (0, 1)]
    places = row_layout(whole.mask, layout.model.windows, 2, balance=balance)
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(places.join([getattr(part, name) for part in parts], 1), getattr(whole, name))
    for rank, part in enumerate(parts):
        assert (part.mask.mask, part.mask.rank, part.mask.layout) == (whole.mask, rank, places)
        assert part.mask.length == part.tokens.shape[1] == places.local_length(rank)
        assert abs(part.mask.length - length / 2) <= 1


def test_rows_stay_together_only_if_no_scheme_computes_what_it_holds():
    mask = _batch().mask
    for schemes, splits in (({None: Ulysses(), 9: Ulysses()}, False), ({None: Ulysses(), 9: Halo()}, True)):
        part = _shard(ContextParallel(), _batch(), 0, _layout(schemes))
        assert (part.mask.layout == SequenceLayout.contiguous(LENGTH, 2)) == (not splits)
        assert part.mask.layout == row_layout(mask, {None: 1, 9: 1}, 2, splits_rows=splits)


class Counting(Ring):
    def __init__(self):
        self.planned = []

    def plan(self, mask, layout, rank, heads):
        self.planned.append((mask.window, mask.documents))
        return super().plan(mask, layout, rank, heads)


def test_plans_of_the_next_batch_are_made_when_it_is_cut():
    """What layers asked of the first batch is ready before they see the second."""
    scheme, heads = Counting(), HeadShape(num_heads=HEADS, num_kv_heads=GROUPS, head_dim=SIZE)
    adapter, layout = ContextParallel(), _layout({None: scheme, 9: scheme})
    first = _shard(adapter, _batch(), 0, layout).mask
    assert scheme.planned == []
    plans = [first.plan(scheme, window, heads) for window in (*WINDOWS, *WINDOWS)]
    assert [window for window, _ in scheme.planned] == [None, 9]
    assert plans[:2] == plans[2:]
    second = _shard(adapter, _batch(61), 0, layout).mask
    assert sorted(str(window) for window, _ in scheme.planned[2:]) == ["9", "None"]
    assert {documents for _, documents in scheme.planned[2:]} == {_batch(61).mask.documents}
    for window in WINDOWS:
        second.plan(scheme, window, heads)
    assert len(scheme.planned) == 4
    other = _shard(ContextParallel(), _batch(), 0, layout).mask  # another run knows nothing of this one
    assert (len(scheme.planned), len(other.asked)) == (4, 0)


def _over(degree, seq, schemes, num_heads=4):
    heads = HeadShape(num_heads=num_heads, num_kv_heads=2, head_dim=8)
    facts = ModelFacts(layer_heads=[heads], layer_windows=[None])
    return Layout(degrees=Degrees(cp=degree), seq=seq, schemes=schemes, model=facts)


def test_check_asks_the_schemes():
    check = ContextParallel().check
    assert check(_over(7, 1000, {None: Ring()})) is None
    assert check(_over(4, 1024, {None: Ulysses()})) is None
    for schemes in ({None: Ulysses()}, {None: Ring(), 9: Ulysses()}):
        assert "4 query heads over 2 key/value heads can be dealt out to at most 4 ranks" in check(
            _over(8, 1024, schemes)
        )
    assert check(_over(1, 1001, {})) is None
    assert "--cp-scheme ring" in check(_over(2, 8, {}))
    assert "--seq 3 cannot be shared out over --cp 4" in check(_over(4, 3, {None: Ring()}))
    assert ContextParallel().applies(Layout(seq=8, degrees=Degrees(cp=2)))
    assert not ContextParallel().applies(Layout(seq=8))


class _OneRank:
    device_type = "cpu"

    def __getitem__(self, axis):
        return SimpleNamespace(get_group=lambda: None)


@pytest.mark.parametrize(
    ("plan", "schemes", "message"),
    [
        (ParallelPlan(block="blocks.*"), SCHEMES[0], "Model's plan names none"),
        (PLAN, None, "none was chosen"),
        (ParallelPlan(block="blocks.*", seams={"attention": "none"}), SCHEMES[0], "matches no module"),
    ],
)
def test_models_and_setups_that_cannot_be_cut_are_refused(plan, schemes, message):
    with pytest.raises(UsageError, match=message):
        ContextParallel().apply(_model(), plan, _OneRank(), _layout(schemes))


def test_a_batch_cannot_be_cut_without_a_scheme():
    with pytest.raises(UsageError, match="none was chosen; type --cp-scheme ring"):
        _shard(ContextParallel(), _batch(), 0, _layout(None))


def test_a_seam_that_somebody_else_took_is_refused():
    model = _model()
    model.blocks[1].core = nn.Identity()
    with pytest.raises(UsageError, match="found Identity in the attention seam"):
        ContextParallel().apply(model, PLAN, _OneRank(), _layout(SCHEMES[0]))


def test_the_entry_says_what_the_adapter_is():
    (entry,) = context_plugin.zoo_register_parallel_adapters()
    adapter = entry.load()()
    assert (entry.name, entry.axes) == (adapter.name, adapter.axes)
