"""The `expert` adapter: what it refuses, what travels, and state that goes from one degree to another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.harness import layouts
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.contracts.models import ExpertShape, ParallelPlan
from zoo.core.errors import UsageError
from zoo.core.mesh.degrees import Degrees
from zoo.core.model.routing import Routing
from zoo.models.common.moe import Dispatch, Experts, balance_objection
from zoo.plugins.parallel.data_parallel.fsdp import FullyShardedData
from zoo.plugins.parallel.expert.adapter import ExpertDispatch, ExpertParallel
from zoo.testing import ranks

EIGHT = ExpertShape(num_experts=8, hidden_size=64, intermediate_size=96)


def request(experts=EIGHT, *, cp=1, dp_shard=1, ep=1, micro_batch=1, aux=False):
    return Layout(
        degrees=Degrees(dp_shard=dp_shard, cp=cp, ep=ep),
        seq=64,
        micro_batch=micro_batch,
        model=ModelFacts(name="mixtral", config=SimpleNamespace(output_router_logits=aux), experts=experts),
    )


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (request(None, dp_shard=4, ep=4), ["--ep 4", "mixtral has none"]),
        (request(cp=2, dp_shard=6, ep=6), ["--ep 6", "8 experts"]),
        (request(dp_shard=3, ep=3), ["--ep 3", "8 experts"]),
        (request(cp=2, dp_shard=4, ep=8), None),
    ],
)
def test_degrees_that_do_not_divide_the_experts_are_refused(layout, words):
    said = ExpertParallel().check(layout)
    assert (said is None) == (words is None), said
    for word in words or ():
        assert word in said


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (request(dp_shard=10, ep=2), ["--ep 2", "= 5 ranks", "64 and 96"]),
        (
            request(dp_shard=12, ep=4, experts=ExpertShape(num_experts=12, hidden_size=4, intermediate_size=8)),
            ["--ep 4 leaves", "4 and 8"],
        ),
        (request(dp_shard=4, cp=4, ep=2), None),
        (request(dp_shard=5), None),
        (request(None, dp_shard=5), None),
    ],
)
def test_widths_that_fsdp_cannot_cut_are_refused(layout, words):
    said = FullyShardedData().check(layout)
    assert (said is None) == (words is None), said
    for word in words or ():
        assert word in said


def test_rows_laid_end_to_end_have_no_balancing_loss():
    assert "data.micro_batch=1" in balance_objection(request(micro_batch=2, aux=True))
    assert balance_objection(request(micro_batch=2)) is None
    assert balance_objection(request(aux=True)) is None


def test_a_model_without_the_seams_is_refused():
    with pytest.raises(UsageError, match="'dispatch'.*Linear's plan"):
        ExpertParallel().apply(torch.nn.Linear(1, 1), ParallelPlan(block="*"), None, None)


# On ranks -----------------------------------------------------------------------------------------

DRAWS = {
    "uneven": lambda rank, draw: torch.randint(0, 8, (7 + 5 * rank, 2), generator=draw),
    "all to one expert": lambda rank, _draw: torch.full((6, 2), 5),
    "to itself": lambda rank, _draw: torch.tensor([[2 * rank, 2 * rank + 1]] * 4),
    "rank 0 has no tokens": lambda rank, draw: torch.randint(0, 8, (3 * rank, 2), generator=draw),
    "padding goes to nobody": lambda rank, draw: torch.randint(0, 8, (9, 2), generator=draw).index_fill(
        0, torch.tensor([1, 4, 8] if rank == 0 else range(9)), 8
    ),
    "nobody has": lambda _rank, _draw: torch.zeros(0, 2, dtype=torch.int64),
}


def dispatched(draw):
    """On a rank: output and gradients by the ranks' dispatch, and by one that has all experts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    ids = DRAWS[draw](rank, generator)
    x, dout = (torch.randn(len(ids), 4, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
    torch.manual_seed(1)
    whole = Experts(4, 6, 8).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    mine = Experts(4, 6, 8 // world).double()
    for own, parameter in zip(mine.parameters(), whole.parameters(), strict=True):
        own.data = parameter.detach().chunk(world)[rank].clone()
    results = []
    for dispatch, experts in ((ExpertDispatch(dist.group.WORLD), mine), (Dispatch(), whole)):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = dispatch(leaves[0], Routing(ids, leaves[1], ids.flatten().bincount(minlength=9)[:8]), experts)
        gradients = torch.autograd.grad(out, [*leaves, *experts.parameters()], dout)
        results.append([out, *gradients])
    # Of one that has all experts, every rank has a part of each gradient.
    for i in range(3, 6):
        dist.all_reduce(results[1][i])
        results[1][i] = results[1][i].chunk(world)[rank]
    return [[value.detach() for value in result] for result in results]


@pytest.mark.dist
@pytest.mark.parametrize("draw", DRAWS)
def test_tokens_reach_their_experts_and_their_gradients_come_back(draw):
    for found, wanted in ranks.run(4, dispatched, draw):
        for value, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


def in_bfloat16(chosen):
    """On a rank: numbers of a step whose arithmetic is bfloat16 and whose weights are not, and what holds them."""
    run = layouts.Run(chosen)
    gradients = run.gradients()
    numbers = {name: value.float() for name, value in run.step().items()}
    kinds = {(p.dtype, str(p.placements)) for n, p in run.model.named_parameters() if ".experts." in n}
    groups = [len(group["params"]) for group in run.state.optimizer.param_groups]
    return numbers, kinds, gradients, groups


@pytest.mark.dist
def test_mixed_precision_is_the_same_at_any_ep_but_for_rounding():
    one, _, expected, _ = ranks.run(1, in_bfloat16, layouts.choose("mixtral", "rows8 bf16"))[0]
    four, kinds, gradients, groups = ranks.run(
        4, in_bfloat16, layouts.choose("mixtral", "dp_shard2 cp2 ep2 rows8 bf16")
    )[0]
    assert kinds == {(torch.float32, "(Shard(dim=1), Shard(dim=0))")}
    # Matrices of each mesh, and vectors: one update each.
    layers = 2
    assert groups == [2 + 5 * layers, 3 * layers, 1 + 2 * layers]
    for name, value in four.items():
        torch.testing.assert_close(value, one[name], rtol=2e-2, atol=2e-2)
    for name, value in gradients.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.2 * expected[name].norm(), name
