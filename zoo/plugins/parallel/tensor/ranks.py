"""Collectives of tensor parallelism: how hidden states pass between the residual's layout and the whole row.

B rows, T tokens of a row, P ranks of `tp`, D model width. Under sequence parallelism the residual `[B, T / P, D]` is
cut on T: every rank has ceil(T / P) tokens, the last ones what is left. Otherwise every rank has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from zoo.core.sequence.ranges import share_of

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MESSAGE_VALUES = 16 << 20
"""Values that are sent in one message at least, where there are as many: 64 MiB in fp32."""

_Item = TypeVar("_Item")


class TensorRanks:
    """The ranks of one `tp` group, as the cut modules of a model use them."""

    def __init__(self, group: ProcessGroup, *, sequence: bool) -> None:
        self.group = group
        self.sequence = sequence
        self.rank, self.size = group.rank(), group.size()
        self._length = 0
        self._entered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def row_of(self, length: int) -> None:
        """What is computed next are rows of so many tokens, in whole."""
        self._length = length

    def enter(self, h: Tensor) -> Tensor:
        """From the residual's layout to `[B, T, D]` on every rank; its gradients are summed over ranks.

        Modules that share an input share the message, forward and backward.
        """
        whole: Tensor | None = self._entered.get(h)  # type: ignore[no-untyped-call]
        if whole is None:
            if self.sequence:
                whole = _Gather.apply(h, self._whole_length(h.shape[1]), self.group)  # type: ignore[no-untyped-call]
            else:
                whole = _Copy.apply(h, self.group)  # type: ignore[no-untyped-call]
            self._entered[h] = whole
        return whole

    def leave(self, part: Tensor) -> Tensor:
        """The sum over ranks of `[B, T, D]`, in the residual's layout."""
        way = _Scatter if self.sequence else _Sum
        left: Tensor = way.apply(part, self.group)  # type: ignore[no-untyped-call]
        return left

    def enter_linear(self, h: Tensor, weight: Tensor) -> Tensor:
        """A product of the whole row: h in the residual's layout, weight `[O, D]`, to `[B, T, O]`."""
        return functional.linear(self.enter(h), weight)

    def leave_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """A product whose sum over ranks is wanted: x `[B, T, I]`, weight `[D, I]`, to the residual's layout."""
        return self.leave(functional.linear(x, weight))

    def total(self, counts: Tensor) -> Tensor:
        """Integers without gradient, of this rank's tokens, summed over ranks."""
        return summed(counts, self.group)

    def part(self, of_tokens: Tensor) -> Tensor:
        """What is known of each token of a row `[B, T]`, of this rank's tokens only."""
        length = of_tokens.shape[1]
        start = min(length, self.rank * -(-length // self.size))
        return of_tokens.narrow(1, start, share_of(length, self.rank, self.size))

    def watch(self, _block: Any, arguments: Iterable[Any]) -> None:
        """Before a block runs, also in backward: the row is as long as its mask says."""
        for argument in arguments:
            length = getattr(argument, "length", None)
            if isinstance(length, int):
                self.row_of(length)

    def _whole_length(self, here: int) -> int:
        """Of the row, or of a piece of it, of which every rank has as much."""
        return self._length if here == share_of(self._length, self.rank, self.size) else here * self.size


class _Copy(Function):
    """The same forward, the sum over ranks backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class _Sum(Function):
    """The sum over ranks forward, the same backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(Function):
    """Parts of T forward, sums of parts backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, length, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scattered(grad, ctx.group), None, None


class _Scatter(Function):
    """Sums of parts of T forward, parts backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.length, ctx.group), None


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, in memory of its own."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def add_up(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Sum each over ranks in place, in fp32 or better: large ones alone, the others of a dtype in one message."""
    for together in in_messages(tensors, Tensor.numel, lambda tensor: str(tensor.dtype)):
        wide = torch.promote_types(together[0].dtype, torch.float32)
        total = torch.cat([tensor.reshape(-1).to(wide) for tensor in together])
        dist.all_reduce(total, group=group)
        parts = torch.split(total, [tensor.numel() for tensor in together])
        for tensor, part in zip(together, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def in_messages(
    items: Iterable[_Item], values: Callable[[_Item], int], kind: Callable[[_Item], str]
) -> Iterator[list[_Item]]:
    """What goes together: small ones of a kind, until they are a large one."""
    waiting: dict[str, list[_Item]] = {}
    for item in items:
        together = waiting.setdefault(kind(item), [])
        together.append(item)
        if sum(map(values, together)) >= _MESSAGE_VALUES:
            yield waiting.pop(kind(item))
    yield from waiting.values()


def gathered(x: Tensor, length: int, group: ProcessGroup) -> Tensor:
    """Each rank's tokens `[B, T / P, D]` to all of them `[B, T, D]`."""
    rows = _padded(x.transpose(0, 1), -(-length // group.size()))
    out = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    _all_gather(out, rows, group=group)
    return out[:length].transpose(0, 1)


def scattered(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[B, T, D]` summed over ranks, of which this rank keeps its tokens `[B, T / P, D]`."""
    length, size = x.shape[1], group.size()
    each = -(-length // size)
    rows = _padded(x.transpose(0, 1), each * size)
    out = rows.new_empty(each, *rows.shape[1:])
    _reduce_scatter(out, rows, group=group)
    return out[: share_of(length, group.rank(), size)].transpose(0, 1)


def _padded(rows: Tensor, count: int) -> Tensor:
    """`[R, B, D]` with rows of zeros up to `count`: messages have one size."""
    missing = count - rows.shape[0]
    return functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows.contiguous()
