"""The `expert` adapter: experts are dealt out over the axis `ep`, and the dispatch seam sends tokens to them and back.

R tokens of this rank, K experts a token goes to, E experts, P ranks of `ep`, D model width, M received copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from zoo import Layout, ParallelAdapter, ParallelPlan, Phase, Routing, UsageError, find_modules, replace_modules
from zoo.core.contracts.account import COUNT_BYTES
from zoo.core.model.routing import Arrangement, by_expert, combine, permute, spread

if TYPE_CHECKING:
    from zoo import Account, Mesh


class ExpertParallel(ParallelAdapter):
    """Expert parallelism for any model whose plan names experts and the seams `dispatch` and `grouped_matmul`."""

    name: ClassVar[str] = "expert"
    axes: ClassVar[tuple[str, ...]] = ("ep",)
    phase: ClassVar[Phase] = Phase.SHARD

    def check(self, layout: Layout) -> str | None:
        """None, or why these experts cannot be dealt out so."""
        degree = layout.degrees.ep
        if layout.model.experts is None:
            return f"--ep {degree} deals out experts and {layout.model.name} has none"
        num_experts = layout.model.experts.num_experts
        if num_experts % degree == 0:
            return None
        return f"--ep {degree} does not divide the {num_experts} experts of {layout.model.name}"

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Keep this rank's experts, as DTensors on `ep`, and swap both seams. Raises UsageError if one is missing."""
        missing = [seam for seam in ("dispatch", "grouped_matmul") if seam not in plan.seams]
        if missing or not plan.expert:
            raise UsageError(
                f"--ep needs experts and a seam '{(missing or ['dispatch'])[0]}', and {type(model).__name__}'s plan "
                f"names none; type --ep 1"
            )
        for glob in plan.expert:
            for name in find_modules(model, glob):
                _deal_out(model.get_submodule(name), mesh["ep"])
        group = mesh["ep"].get_group()
        replace_modules(model, plan.seams["dispatch"], lambda _old: ExpertDispatch(group), owner=self.name)
        replace_modules(model, plan.seams["grouped_matmul"], _LocalMatmul, owner=self.name)
        return model

    def account(self, account: Account) -> None:
        """Add counts and copies of tokens (2006.16668): there and back, forward and again for their gradients."""
        ranks, experts = account.size("ep"), account.found(account.plan.expert)
        for name in account.within(experts):
            weight = account.weights[name]
            shape = (weight.shape[0] // ranks, *weight.shape[1:])
            account.weights[name] = replace(weight, shape=shape, mesh=("ep",), cut=("ep",))
        assert account.experts is not None, "checked before"
        counts = account.experts.num_experts // ranks * (ranks - 1) * COUNT_BYTES
        row = account.config.hidden_size * account.value_bytes
        for batch in account.batches:
            for gone, come in account.copies(batch, len(account.here(experts))):
                forwards = account.forwards
                account.add("all_to_all", "ep", "counts", forwards * counts, messages=forwards)
                copies = (forwards + 1) * (gone + come) * row
                account.add("all_to_all", "ep", "copies of tokens", copies, messages=2 * (forwards + 1))


class ExpertDispatch(nn.Module):
    """The dispatch seam over P ranks, each with E / P experts: no copy is dropped, no row padded, no padding sent.

    What overlaps: the counts travel while copies are sorted and gathered. The copies themselves wait for them, and the
    experts for the copies, for a block has nothing else to compute meanwhile. Backward is the same way back.
    """

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor, routing: Routing, experts: nn.Module) -> Tensor:
        """x `[R, D]` to the weighted sum of its experts' outputs `[R, D]`, wherever they are."""
        arriving = torch.empty_like(routing.counts)
        counting = dist.all_to_all_single(arriving, routing.counts, group=self.group, async_op=True)
        arranged = by_expert(routing.ids)
        copies = spread(x, arranged)
        counting.wait()
        # [P, E / P]: of each rank's copies, how many are for each expert here.
        arriving = arriving.view(self.group.size(), -1)
        # The one wait for the device: sizes of what goes and what comes.
        sent, received = torch.stack((routing.counts.view_as(arriving), arriving)).sum(2).tolist()
        # Copies of padding come last, and stay.
        rows = exchange(copies[: sum(sent)], sent, received, self.group)
        local = by_expert(_expert_of_row(arriving, sum(received))[:, None])
        out = permute(experts(permute(rows, local), arriving.sum(0)), Arrangement(local.inverse, local.order))
        back = exchange(out, received, sent, self.group)
        back = functional.pad(back, (0, 0, 0, len(copies) - len(back)))
        return combine(back, routing.weights, arranged)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """rows `[sum(sent), D]`, first those for rank 0 of the group, to `[sum(received), D]`, first those from it."""
    exchanged: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """All-to-all with uneven counts; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.way = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _all_to_all(grad, received, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _expert_of_row(arriving: Tensor, num_rows: int) -> Tensor:
    """Which expert here each received row `[M]` is for: they come by rank, and from each rank by expert."""
    ids = torch.arange(arriving.shape[1], device=arriving.device).repeat(arriving.shape[0])
    return ids.repeat_interleave(arriving.flatten(), output_size=num_rows)


class _LocalMatmul(nn.Module):
    """The grouped-matmul seam on this rank's experts: DTensors to the tensors they hold here."""

    def __init__(self, matmul: nn.Module) -> None:
        super().__init__()
        self.matmul = matmul

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        out: Tensor = self.matmul(rows, weight.to_local() if isinstance(weight, DTensor) else weight, counts)
        return out


def _deal_out(experts: nn.Module, ep: DeviceMesh) -> None:
    """Replace parameters `[E, ...]` by DTensors of which this rank holds E / P; all on meta."""
    for owner in experts.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            local = parameter.detach()[: parameter.shape[0] // ep.size()]
            placed = DTensor.from_local(local, ep, [Shard(0)], run_check=False)
            setattr(owner, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
