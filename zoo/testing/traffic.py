"""Counts what a rank really hands to its collectives, by kind and group: what formulas are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import Account, ParallelPlan, find_modules
from zoo.core.contracts.account import Kind, Total

_Payload = Callable[[tuple[Any, ...], int, int], int]
"""Bytes of a call's arguments, of a rank of a group of so many."""


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _elsewhere(args: tuple[Any, ...], rank: int, size: int) -> int:
    """Of an all-to-all of `args[1]`, split as `args[4]` says or evenly, what is for other ranks."""
    rows: Tensor = args[1]
    splits: list[int] = list(args[4]) or [rows.shape[0] // size] * size
    return (sum(splits) - splits[rank]) * (_bytes(rows) // max(1, rows.shape[0]))


_C10D: Mapping[str, tuple[Kind, _Payload]] = {
    "_allgather_base_": ("all_gather", lambda args, _rank, _size: _bytes(args[0])),
    "allgather_": ("all_gather", lambda args, _rank, size: _bytes(args[1]) * size),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args, _rank, _size: _bytes(args[1])),
    "allreduce_": ("all_reduce", lambda args, _rank, _size: _bytes(args[0])),
    "broadcast_": ("broadcast", lambda args, _rank, _size: _bytes(args[0])),
    "alltoall_base_": ("all_to_all", _elsewhere),
    "send": ("send", lambda args, _rank, _size: _bytes(args[0])),
}
_FUNCTIONAL: Mapping[str, tuple[Kind, _Payload]] = {
    "all_gather_into_tensor": ("all_gather", lambda args, _rank, size: _bytes(args[0]) * size),
    "all_reduce": ("all_reduce", lambda args, _rank, _size: _bytes(args[0])),
    "all_reduce_": ("all_reduce", lambda args, _rank, _size: _bytes(args[0])),
    "reduce_scatter_tensor": ("reduce_scatter", lambda args, _rank, _size: _bytes(args[0])),
}
_QUIET = {"recv_", "recv_any_source_", "wait_tensor", "_wrap_tensor_autograd", "check_for_nan"}


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside `with`, every collective of this thread is counted.

    `totals` has them by kind and ranks of the group: how many messages, and bytes as `zoo.core.plan.traffic`
    defines them. Raises NotImplementedError at a collective it cannot count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.totals: dict[tuple[Kind, tuple[int, ...]], Total] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it sends by calls of plain tensors, which come by here again
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name not in _QUIET:
            group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            self._count(_C10D, name, args, group)
        elif func.namespace == "_c10d_functional" and name not in _QUIET:
            self._count(_FUNCTIONAL, name, args, _resolve_process_group(args[-1]))
        return func(*args, **(kwargs or {}))

    def _count(self, known: Mapping[str, tuple[Kind, _Payload]], name: str, args: Any, group: ProcessGroup) -> None:
        if name not in known:
            raise NotImplementedError(f"bytes of the collective {name} are not counted; add it to {__name__}")
        kind, payload = known[name]
        key = kind, tuple(dist.get_process_group_ranks(group))
        self.totals[key] = self.totals.get(key, Total()).plus(1, payload(args, group.rank(), group.size()))


class Routed:
    """What routers decide from now on: the seams `dispatch` of a model on a rank of an `ep` group write it down."""

    def __init__(self, model: nn.Module, plan: ParallelPlan, group: ProcessGroup) -> None:
        self._counts: list[Tensor] = []
        self._group = group
        for name in find_modules(model, plan.seams["dispatch"]):
            # A block that runs again stops before its end, so what it decides again is not written down.
            model.get_submodule(name).register_forward_hook(self._note)

    def _note(self, _module: nn.Module, args: tuple[Any, ...], _out: Tensor) -> None:
        self._counts.append(args[1].counts)

    def copies(self) -> list[tuple[int, int]]:
        """Of each call, copies of tokens that went to other ranks of the group and that came from them; collective."""
        mine = torch.stack(self._counts)
        every = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(every, mine, group=self._group)
        me, size = self._group.rank(), self._group.size()
        # [from, call, to]
        table = torch.stack(every).view(size, len(mine), size, -1).sum(3)
        table[torch.arange(size), :, torch.arange(size)] = 0
        return list(zip(table[me].sum(1).tolist(), table[:, :, me].sum(0).tolist(), strict=True))


def compared(
    wire: CollectiveCounter, account: Account
) -> dict[tuple[Kind, tuple[int, ...]], tuple[tuple[str, ...], Total, Total]]:
    """By kind and ranks of the group: the axes that have these ranks, what was counted, and what the account says."""
    axes: dict[tuple[Kind, tuple[int, ...]], tuple[str, ...]] = {}
    said: dict[tuple[Kind, tuple[int, ...]], Total] = {}
    for (kind, axis), total in account.totals().items():
        key = kind, account.ranks(axis)
        axes[key] = (*axes.get(key, ()), axis)
        said[key] = said.get(key, Total()).plus(*total)
    keys = sorted({*said, *wire.totals}, key=lambda key: (key[0], axes.get(key, ()), key[1]))
    return {key: (axes.get(key, ()), wire.totals.get(key, Total()), said.get(key, Total())) for key in keys}


def _is_group(value: torch.ScriptObject) -> bool:
    return str(value._type()).endswith("ProcessGroup")
