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

from tests.distributed import ranks
from zoo.core.attention.mask import Mask
from zoo.core.attention.seam import AttentionSeam
from zoo.core.batch import Batch
from zoo.core.contracts import AttentionProblem, LayoutRequest, ParallelPlan, Setup
from zoo.core.errors import UsageError
from zoo.plugins.attention.sdpa import Sdpa
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.ring import Ring
from zoo.plugins.parallel import context_plugin
from zoo.plugins.parallel.context import ContextParallel

PLAN = ParallelPlan(block="blocks.*", seams={"attention": "blocks.*.core"})
HEADS, GROUPS, SIZE, LENGTH = 4, 2, 8, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HEADS * SIZE, (HEADS + 2 * GROUPS) * SIZE)
        self.core = AttentionSeam(Sdpa())

    def forward(self, h, mask, recompute):
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in self.qkv(h).split([32, 16, 16], -1))
        run = (lambda *a: checkpoint(self.core, *a, use_reentrant=False)) if recompute else self.core
        return h + run(q, k, v, mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, HEADS * SIZE)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, batch, recompute=False):
        h = self.embed(batch.tokens) + torch.sin(batch.positions[..., None] / 9.0)
        for block in self.blocks:
            h = block(h, batch.mask, recompute)
        weight = (batch.labels >= 0) / 10.0
        return (h.square().sum(-1) * weight).sum()


def _batch():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (1, LENGTH)))
    documents = ((0, 10), (10, 45), (45, 60))
    positions = torch.cat([torch.arange(b - a) for a, b in (*documents, (60, 64))])[None]
    labels = torch.where(torch.arange(LENGTH) % 3 == 0, -100, tokens)
    return Batch(tokens=tokens, labels=labels, positions=positions, mask=Mask(LENGTH, documents))


def _setup(scheme):
    return Setup(seq=LENGTH, scheme=scheme, dtype="float64", master_dtype="float64")


def _model():
    torch.manual_seed(1)
    return Model().double()


def _step(model, batch, recompute=False):
    loss = model(batch, recompute)
    loss.backward()
    return loss.detach()


def _on_a_rank(scheme, sharded, recompute):
    """The summed loss and gradients, and how many seams were told to exchange."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    adapter, model = ContextParallel(), _model()
    names = [name for name, _ in model.named_parameters()]
    model = adapter.apply(model, PLAN, _Mesh(mesh), _setup(scheme))
    if sharded:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        for module in filter(lambda m: isinstance(m, FSDPModule), model.modules()):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    assert [name for name, _ in model.named_parameters()] == names
    loss = _step(model, adapter.shard_batch(_batch(), _Mesh(mesh), _setup(scheme)), recompute)
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
    for total in (loss, *(() if sharded else grads)):
        dist.all_reduce(total)
    return loss, grads, sum(m.exchange is not None for m in model.modules() if isinstance(m, AttentionSeam))


class _Mesh:
    """core's mesh as adapters see it."""

    device_type = "cpu"

    def __init__(self, mesh):
        self._mesh = mesh

    def __getitem__(self, axis):
        assert axis == "cp"
        return self._mesh


@pytest.mark.dist
@pytest.mark.parametrize("scheme", [Ring(), Allgather()], ids=lambda s: s.name)
@pytest.mark.parametrize(("sharded", "recompute"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("world", [2, 4])
def test_a_cut_model_is_the_same_function(world, scheme, sharded, recompute):
    model = _model()
    wanted = _step(model, _batch())
    for loss, grads, seams in ranks.run(world, _on_a_rank, scheme, sharded, recompute):
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
        assert seams == 2
        for got, parameter in zip(grads, model.parameters()):
            torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-10)


def _cut(rank):
    cp = SimpleNamespace(get_local_rank=lambda: rank, size=lambda: 2)
    return ContextParallel().shard_batch(_batch(), {"cp": cp}, _setup(Ring()))


def test_a_batch_is_cut_by_the_schemes_layout():
    whole, parts = _batch(), [_cut(0), _cut(1)]
    layout = Ring().layout(LENGTH, 2)
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(layout.join([getattr(part, name) for part in parts], 1), getattr(whole, name))
    assert [(part.mask.mask, part.mask.rank, part.mask.length) for part in parts] == [
        (whole.mask, 0, 32),
        (whole.mask, 1, 32),
    ]


def _request(degree, seq, scheme):
    problem = AttentionProblem(device="cpu", dtype="float32", head_dim=8, num_heads=4, num_kv_heads=2)
    return LayoutRequest(degrees={"cp": degree}, seq=seq, model="m", config=None, problem=problem, scheme=scheme)


def test_check_asks_the_scheme():
    check = ContextParallel().check
    assert check(_request(7, 1000, Ring())).startswith("--seq 1000 with --cp 7")
    assert check(_request(8, 1024, Ring())) is None
    assert check(_request(1, 1001, None)) is None
    assert "--cp-scheme ring" in check(_request(2, 8, None))
    assert ContextParallel().applies({"cp": 2}, _setup(None))
    assert not ContextParallel().applies({"cp": 1}, _setup(None))


class _OneRank:
    device_type = "cpu"

    def __getitem__(self, axis):
        return SimpleNamespace(get_group=lambda: None)


@pytest.mark.parametrize(
    ("plan", "scheme", "message"),
    [
        (ParallelPlan(block="blocks.*"), Ring(), "Model's plan names none"),
        (PLAN, None, "none was chosen"),
        (ParallelPlan(block="blocks.*", seams={"attention": "none"}), Ring(), "matches no module"),
    ],
)
def test_models_and_setups_that_cannot_be_cut_are_refused(plan, scheme, message):
    with pytest.raises(UsageError, match=message):
        ContextParallel().apply(_model(), plan, _OneRank(), _setup(scheme))


def test_a_seam_that_somebody_else_took_is_refused():
    model = _model()
    model.blocks[1].core = nn.Identity()
    with pytest.raises(UsageError, match="found Identity in the attention seam"):
        ContextParallel().apply(model, PLAN, _OneRank(), _setup(Ring()))


def test_the_entry_says_what_the_adapter_is():
    (entry,) = context_plugin.zoo_register_parallel_adapters()
    adapter = entry.load()()
    assert (entry.name, entry.axes) == (adapter.name, adapter.axes)
