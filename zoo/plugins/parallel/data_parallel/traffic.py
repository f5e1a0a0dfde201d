"""What data parallelism sends: weights gathered and gradients reduced, unit by unit, as FSDP2 packs them.

F ranks share a weight, C have copies of it, M microbatches a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from zoo import Account
from zoo.core.contracts.account import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that travel together, and how often in a step."""

    names: Sequence[str]
    is_root: bool = False
    is_expert: bool = False


def units(account: Account) -> Iterator[Unit]:
    """Of this rank, as `units.wrap` makes them: experts, blocks without them, and what is left."""
    left = set(account.weights)
    experts = account.here(account.found(account.plan.expert))
    for modules, is_expert in ((experts, True), (account.blocks, False)):
        for module in modules:
            names = [name for name in account.within([module]) if name in left]
            left.difference_update(names)
            yield Unit(names=names, is_expert=is_expert)
    yield Unit(names=[name for name in account.weights if name in left], is_root=True)


def account_sharded(account: Account, *, reshard: bool, once: bool) -> None:
    """FSDP2 (2304.11277): (F - 1) / F of a unit arrives at each gathering and leaves at each reduction.

    A unit is gathered for its forward and, if it was given up between, for its backward; the root, and all units where
    `once` or a schedule says so, are gathered and kept. With `once` gradients wait for the step's last backward.
    """
    microbatches = len(account.batches)
    once = once or account.splits
    for unit in units(account):
        shard, copies = ("efsdp" if unit.is_expert else "fsdp"), account.size("dp_replicate") > 1
        if account.degrees.ep == 1:
            shard = "fsdp"
        ranks = account.size(shard)
        shapes = [_shard(account.weights[name].shape, ranks, unit.is_expert) for name in unit.names]
        values = sum(map(prod, shapes))  # of padded shards, which are what travels
        kept = unit.is_root or not reshard or once
        gathers = (1 if once or account.pipelined else microbatches) if kept else 2 * microbatches
        reductions = 1 if once else microbatches
        if values:
            bytes_gathered, bytes_reduced = values * ranks * account.value_bytes, values * ranks * account.master_bytes
            account.add("all_gather", shard, "weights", gathers * bytes_gathered, messages=gathers)
            account.add("reduce_scatter", shard, "gradients", reductions * bytes_reduced, messages=reductions)
            account.add("all_reduce", "dp_replicate", "gradients", values * account.master_bytes)
        mesh = ("dp_replicate", shard) if copies else (shard,)
        for name, shape in zip(unit.names, shapes, strict=True):
            weight = account.weights[name]
            rows = max(0, min(shape[0], weight.shape[0] - account.rank(shard) * shape[0]))
            held = shape if shape[1:] != weight.shape[1:] else (rows, *shape[1:])
            account.weights[name] = _placed(weight, held, mesh, (shard,))


def account_replicated(account: Account) -> None:
    """`replicate`: of a unit, gradients are all-reduced once a step."""
    for unit in units(account):
        axis = "eddp" if unit.is_expert and account.degrees.ep > 1 else "ddp"
        values = sum(account.weights[name].values for name in unit.names)
        if values:
            account.add("all_reduce", axis, "gradients", values * account.master_bytes)
        for name in unit.names:
            weight = account.weights[name]
            account.weights[name] = _placed(weight, weight.shape, (axis,), ())


def _placed(weight: Weight, shape: tuple[int, ...], mesh: tuple[str, ...], cut: tuple[str, ...]) -> Weight:
    return replace(weight, shape=shape, mesh=(*mesh, *weight.mesh), cut=(*cut, *weight.cut))


def _shard(shape: tuple[int, ...], ranks: int, is_expert: bool) -> tuple[int, ...]:
    """A rank's part, padded so that all are alike: of dim 0, and of experts of dim 1 where that can be cut evenly."""
    if is_expert and len(shape) > 1 and shape[1] % ranks == 0:
        return (shape[0], shape[1] // ranks, *shape[2:])
    return (-(-shape[0] // ranks), *shape[1:])
