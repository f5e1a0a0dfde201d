"""Which token goes to which experts, what a router did in all, and copies of rows by expert and back.

R tokens, D model width, E experts, K experts a token goes to. Tokens of padding go to no expert.
Nothing here depends on the order of atomics, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where tokens go."""

    ids: Tensor
    """[R, K] int64; E, which is no expert, for padding."""
    weights: Tensor
    """[R, K] in fp32 or better, differentiable; of a token they add up to 1, of padding to 0."""
    counts: Tensor
    """[E] int64: how many copies each expert gets. Together R * K, less the copies of padding."""


class RouterStats(NamedTuple):
    """What a block's router did to the tokens it saw, padding left out; sums, so that parts of a row add up."""

    probabilities: Tensor
    """[E] in fp32 or better, differentiable: router probabilities summed over tokens."""
    assignments: Tensor
    """[E] int64: how many tokens went to each expert, each of a token's K counted."""


class Arrangement(NamedTuple):
    """A permutation of the R * K copies of tokens, by expert and by token within one."""

    order: Tensor
    """[R * K] int64: place to copy; copy c is of token c // K."""
    inverse: Tensor
    """[R * K] int64: copy to place."""


def by_expert(ids: Tensor) -> Arrangement:
    """The arrangement of ids `[R, K]`, copies that go to no expert last; no wait for the device."""
    return arrangement(ids.flatten().argsort(stable=True))


def arrangement(order: Tensor) -> Arrangement:
    """A permutation with its inverse."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Arrangement(order, inverse)


def spread(x: Tensor, arranged: Arrangement) -> Tensor:
    """x `[R, D]` to a copy `[R * K, D]` for each expert a token goes to, in that arrangement."""
    copies: Tensor = _Spread.apply(x, *arranged)  # type: ignore[no-untyped-call]
    return copies


def permute(rows: Tensor, arranged: Arrangement) -> Tensor:
    """rows `[M, D]`, taken in that order."""
    permuted: Tensor = _Permute.apply(rows, *arranged)  # type: ignore[no-untyped-call]
    return permuted


def combine(rows: Tensor, weights: Tensor, arranged: Arrangement) -> Tensor:
    """Arranged rows `[R * K, D]` and weights `[R, K]` to the weighted sum `[R, D]`, added up in the weights' dtype."""
    num_tokens, top_k = weights.shape
    back = permute(rows, Arrangement(arranged.inverse, arranged.order)).view(num_tokens, top_k, rows.shape[1])
    total = weights[:, :1] * back[:, 0]
    for k in range(1, top_k):
        total = total + weights[:, k : k + 1] * back[:, k]
    return total.to(rows.dtype)


class _Spread(torch.autograd.Function):
    """`index_select`, whose own backward would add rows up in no fixed order on an accelerator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse, ctx.num_tokens = inverse, len(x)
        return x.index_select(0, order // max(1, len(order) // max(1, len(x))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.num_tokens == 0:
            return torch.zeros_like(grad), None, None
        return grad.index_select(0, ctx.inverse).view(ctx.num_tokens, -1, grad.shape[1]).sum(1), None, None


class _Permute(torch.autograd.Function):
    """A permutation, whose backward is the inverse one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None
