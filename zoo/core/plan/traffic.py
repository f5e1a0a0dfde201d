"""What a rank sends in one training step, by collective and group: arithmetic on the host, before anything starts.

| kind | payload | a rank of P sends at least |
|---|---|---|
| all_gather | the whole, as every rank has it afterwards | (P - 1) / P of it |
| reduce_scatter | the whole, as every rank has it before | (P - 1) / P of it |
| all_reduce | the tensor | 2 (P - 1) / P of it (reduce-scatter, then all-gather) |
| broadcast | the tensor | (P - 1) / P of it, in the mean over ranks |
| all_to_all | what is for other ranks | the payload |
| send | the message | the payload |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from zoo.core.contracts.account import Account, Kind, Microbatch, Weight
from zoo.core.contracts.globs import find_modules
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import ModelSpec
from zoo.core.contracts.parallel import MemoryPolicy, ParallelAdapter
from zoo.core.model.inventory import meta_model

if TYPE_CHECKING:
    from torch import nn


_WHOLE = {"all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_reduce": 2}


@runtime_checkable
class Repeating(Protocol):
    """A memory policy that runs blocks more than once."""

    forwards: int
    """How often a block's forward runs in a step."""


def sent(kind: Kind, ranks: int, payload: int) -> float:
    """Bytes that a rank of so many puts on the wire at least, of a payload."""
    return payload * _WHOLE[kind] * (ranks - 1) / ranks if kind in _WHOLE else float(payload)


def step_traffic(
    spec: ModelSpec,
    config: Any,
    *,
    layout: Layout,
    adapters: Sequence[ParallelAdapter],
    policy: MemoryPolicy,
    batches: Sequence[Microbatch],
    rank: int = 0,
    device: str = "cpu",
    model: nn.Module | None = None,
) -> Account:
    """The account of a rank for a step of these microbatches of its own: gradients and their norm.

    `model` is the one of this config on meta, where there is one already. An adapter without `account` counts as
    silent, here and to those after it.
    """
    model, plan = model or meta_model(spec, config), spec.plan(config)
    account = Account(
        spec=spec,
        config=config,
        plan=plan,
        model=model,
        layout=layout,
        number=rank,
        batches=batches,
        device=device,
        forwards=policy.forwards if isinstance(policy, Repeating) else 1,
        weights={name: Weight(shape=tuple(p.shape)) for name, p in model.named_parameters()},
        blocks=find_modules(model, plan.block),
    )
    for adapter in sorted(adapters, key=lambda a: (a.phase, a.name)):
        adapter.account(account)
    for entry in account.afterwards:
        entry()
    _norm(account)
    return account


def _norm(account: Account) -> None:
    """Of the weights that the same ranks cut, a square is summed over each axis that cuts them."""
    counted = [weight.cut for name, weight in account.weights.items() if name not in account.repeated]
    cuts = {tuple(axis for axis in cut if account.size(axis) > 1) for cut in counted}
    alike = {tuple(map(account.ranks, cut)): cut for cut in sorted(cuts)}
    for axis in (axis for cut in alike.values() for axis in cut):
        account.add("all_reduce", axis, "gradient norm", account.master_bytes)
