"""Matrix products of tensor parallelism in pieces, each beside the message that brings or takes the next one.

torch's symmetric-memory kernels (`torch.ops.symm_mem`, CUDA devices that reach each other's memory) do both halves:
all-gather with the products that read it, and a product with the reduce-scatter of its result. Method: decomposition
into P pieces of T / P tokens (Wang et al., ASPLOS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from zoo.plugins.parallel.tensor.ranks import TensorRanks, scattered


class OverlappingRanks(TensorRanks):
    """Ranks of a `tp` group under sequence parallelism, whose products overlap their messages.

    Rows whose tokens the ranks do not share evenly go the plain way. Of several modules with one input the first
    overlaps the gather; where gradients of several come together, nothing is left to overlap their scatter.
    """

    def enter_linear(self, h: Tensor, weight: Tensor) -> Tensor:
        """h `[B, T / P, D]`, weight `[O, D]`, to `[B, T, O]`."""
        if h in self._entered or self._whole_length(h.shape[1]) != h.shape[1] * self.size:
            return super().enter_linear(h, weight)
        whole, out = _GatherLinear.apply(h, weight, self.group)  # type: ignore[no-untyped-call]
        self._entered[h] = whole
        result: Tensor = out
        return result

    def leave_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x `[B, T, I]`, weight `[D, I]`, to the sum over ranks, `[B, T / P, D]`."""
        if x.shape[1] % self.size:
            return super().leave_linear(x, weight)
        out: Tensor = _LinearScatter.apply(x, weight, self.group)  # type: ignore[no-untyped-call]
        return out


class _GatherLinear(Function):
    """The whole row, and its product."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        whole, (out,) = all_gather_matmul(h.contiguous(), [weight.t()], 1, group.group_name)
        ctx.save_for_backward(whole, weight)
        ctx.set_materialize_grads(False)
        ctx.group = group
        return whole, out

    @staticmethod
    def backward(ctx: Any, grad_whole: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, weight = ctx.saved_tensors
        if grad_out is None:
            return (None if grad_whole is None else scattered(grad_whole, ctx.group)), None, None
        if grad_whole is None:
            grad_h = matmul_reduce_scatter(grad_out.contiguous(), weight, "sum", 1, ctx.group.group_name)
        else:
            grad_h = scattered(grad_whole + grad_out @ weight, ctx.group)
        return grad_h, _weight_gradient(grad_out, whole), None


class _LinearScatter(Function):
    """A product, summed over ranks, of which each keeps its tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        out: Tensor = matmul_reduce_scatter(x.contiguous(), weight.t(), "sum", 1, group.group_name)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole, (grad_x,) = all_gather_matmul(grad.contiguous(), [weight], 1, ctx.group.group_name)
        return grad_x, _weight_gradient(whole, x), None


def all_gather_matmul(shard: Tensor, weights: list[Tensor], dim: int, group: str) -> tuple[Tensor, list[Tensor]]:
    """The whole of `shard` along a dim, and its products."""
    whole, products = torch.ops.symm_mem.fused_all_gather_matmul(shard, weights, dim, group, return_A=True)
    return whole, products


def matmul_reduce_scatter(x: Tensor, weight: Tensor, op: str, dim: int, group: str) -> Tensor:
    """This rank's part along a dim of the product, reduced over ranks."""
    out: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight, op, dim, group)
    return out


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`[B, T, O]` and `[B, T, I]` to `[O, I]`."""
    return grad.flatten(0, 1).t() @ x.flatten(0, 1)
