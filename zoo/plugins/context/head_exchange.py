"""Heads dealt out within a group of ranks, and what they computed given back: two exchanges, few copies.

Shape letters: B rows, T tokens of this rank, S tokens of its group, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from zoo import Link
from zoo.core.attention.wire import exchange
from zoo.core.sequence.ranges import Range
from zoo.plugins.context.hybrid_plan import HybridPlan

_IN, _OUT = 2, 3


def gather_rows(
    plan: HybridPlan, link: Link, tensors: Sequence[Tensor], ranges: Sequence[Sequence[Range]]
) -> list[Tensor]:
    """Tensors `[B, heads, T, H]` to this rank's heads of all the group's rows, `[B, heads, S, H]` each.

    `ranges[p][i]` are the heads of tensor i that go to number p of the group.
    """
    like = tensors[0]
    batch, size, dtype = like.shape[0], like.shape[3], link.carried(like.dtype)
    widths = [stop - start for start, stop in ranges[plan.me]]
    whole = torch.empty((plan.rows, batch, sum(widths), size), dtype=dtype, device=like.device)
    lengths = [stop - start for start, stop in plan.places[plan.me]]
    sends, receives = [], []
    for number, peer in enumerate(plan.peers):
        parts = [x[:, a:b] for x, (a, b) in zip(tensors, ranges[number], strict=True)]
        if number == plan.me:
            for place, (start, stop) in zip(plan.places[number], pairwise(accumulate(lengths, initial=0)), strict=True):
                _lay([x[:, :, start:stop] for x in parts], whole[slice(*place)])
            continue
        width = sum(x.shape[1] for x in parts)
        packed = _lay(parts, torch.empty((plan.local, batch, width, size), dtype=dtype, device=like.device))
        sends += [(peer, piece) for piece in torch.split(packed, lengths)]
        receives += [(peer, whole[slice(*place)]) for place in plan.places[number]]
    exchange(link, sends, receives, tag=_IN).wait()
    return [x.to(like.dtype) for x in torch.split(whole.permute(1, 2, 0, 3), widths, dim=1)]


def scatter_rows(
    plan: HybridPlan,
    link: Link,
    tensors: Sequence[Tensor],
    ranges: Sequence[Sequence[Range]],
    num_heads: Sequence[int],
) -> list[Tensor]:
    """The way back: this rank's heads of the group's rows to all heads of its own rows; replicated heads add up.

    Tensors are `[B, heads, S, H]`; `ranges` as in `gather_rows`; `num_heads[i]` are those of result i.
    """
    like = tensors[0]
    batch, size, dtype = like.shape[0], like.shape[3], link.carried(like.dtype)
    packed = _rows_first(tensors, dtype)
    lengths = [stop - start for start, stop in plan.places[plan.me]]
    sends, receives = [], []
    arrived: list[list[Tensor]] = []
    for number, peer in enumerate(plan.peers):
        mine = [packed[slice(*place)] for place in plan.places[number]]
        if number == plan.me:
            arrived.append(mine)
            continue
        width = sum(stop - start for start, stop in ranges[number])
        rows = torch.empty((plan.local, batch, width, size), dtype=dtype, device=like.device)
        arrived.append(list(torch.split(rows, lengths)))
        sends += [(peer, piece) for piece in mine]
        receives += [(peer, piece) for piece in arrived[-1]]
    exchange(link, sends, receives, tag=_OUT).wait()
    shapes = [(plan.local, batch, heads, size) for heads in num_heads]
    results = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes]
    for parts, pieces in zip(ranges, arrived, strict=True):
        widths = [stop - start for start, stop in parts]
        for piece, (start, stop) in zip(pieces, pairwise(accumulate(lengths, initial=0)), strict=True):
            for result, (a, b), heads in zip(results, parts, torch.split(piece, widths, dim=2), strict=True):
                result[start:stop, :, a:b] += heads
    return [result.permute(1, 2, 0, 3) for result in results]


def _lay(tensors: Sequence[Tensor], out: Tensor) -> Tensor:
    """Tensors `[B, heads, rows, H]` side by side in out `[rows, B, heads, H]`, which is returned."""
    at = 0
    for x in tensors:
        out[:, :, at : at + x.shape[1]].copy_(x.permute(2, 0, 1, 3))
        at += x.shape[1]
    return out


def _rows_first(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors side by side as `[rows, B, heads, H]`; the one tensor itself if it lies so already."""
    if len(tensors) == 1:
        return tensors[0].permute(2, 0, 1, 3).to(dtype).contiguous()
    like, width = tensors[0], sum(x.shape[1] for x in tensors)
    shape = (like.shape[2], like.shape[0], width, like.shape[3])
    return _lay(tensors, torch.empty(shape, dtype=dtype, device=like.device))
