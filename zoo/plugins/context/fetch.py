"""Attention over keys fetched straight from their owners, some heads at a time: what `allgather` and `halo` share.

Only visible rows are fetched, so packed documents cost what they share and no more. Messages go straight from the
packed K/V into place at the reader: an `all_to_all` (which NCCL builds from the same messages) would need a copy of
the rows for each reader first. Shape letters: B rows, T tokens of this rank, G key/value heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from zoo import AttentionBackend, AttentionProblem, HeadShape, Link, Mask, SequenceLayout
from zoo.core.attention.merge import accumulation_dtype
from zoo.core.attention.partial import Gradients, Result
from zoo.core.attention.wire import Transfer, add_rows, empty_rows, heads, pack, post, rows_in
from zoo.core.sequence.ranges import Range, count
from zoo.plugins.context.fetch_plan import FetchPlan, fetch_plan

_KEYS, _GRADIENTS = 0, 1


class FetchScheme(ABC):
    """Own keys are computed with while the first heads of the others travel, and those while the next ones do.

    Two buffers hold two groups of heads; gradients of fetched rows go back in fp32 (fp64 stays) one group behind.
    """

    name: str
    splits_rows = True

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None: any rows can be fetched."""
        return None

    @abstractmethod
    def num_groups(self, heads: HeadShape, degree: int) -> int:
        """In how many parts the key/value heads are fetched."""

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape) -> FetchPlan:
        return fetch_plan(mask, layout, rank, heads, num_groups=self.num_groups(heads, layout.degree))

    def forward(
        self, backend: AttentionBackend, plan: FetchPlan, link: Link, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        fetched = _Fetch(plan, link, k, v)
        result = Result(backend, q, k, v, plan.own, scale=scale)
        for number, groups in enumerate(plan.groups):
            result.add(*fetched.arrive(number), plan.step, groups=groups)
        out = result.out.to(q.dtype)
        return out, (q, k, v, out, result.lse)

    def backward(
        self,
        backend: AttentionBackend,
        plan: FetchPlan,
        link: Link,
        dout: Tensor,
        saved: tuple[Tensor, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        fetched = _Fetch(plan, link, k, v)
        grads = Gradients(backend, dout, q, k, v, out, lse, plan.own, scale=scale)
        returning = _Return(plan, link, accumulation_dtype(k.dtype))
        for number, groups in enumerate(plan.groups):
            dk, dv = grads.add(*fetched.arrive(number), plan.step, groups=groups)
            returning.add_home(grads)
            returning.send(dk, dv, groups)
        returning.add_home(grads)
        return grads.dq, grads.dk, grads.dv


class _Fetch:
    """K/V rows on their way from their owners to their readers, one group of heads ahead of what is computed."""

    def __init__(self, plan: FetchPlan, link: Link, k: Tensor, v: Tensor) -> None:
        self._plan, self._link, self._k, self._v = plan, link, k, v
        self._coming = self._post(0)

    def arrive(self, number: int) -> tuple[Tensor, Tensor]:
        """K and V of a group of heads as `[B, G, rows, H]`, in order of position; the next group sets out."""
        transfer, _, keys = self._coming
        transfer.wait()
        self._coming = self._post(number + 1)
        return heads(keys)

    def _post(self, number: int) -> tuple[Transfer, Tensor, Tensor]:
        """Start a group of heads. The packed rows must live as long as they travel."""
        plan, link = self._plan, self._link
        if number == len(plan.groups):
            return Transfer(), self._k, self._k
        heads_of = slice(*plan.groups[number])
        k, v = self._k[:, heads_of], self._v[:, heads_of]
        dtype = link.carried(k.dtype)
        packed = pack(k, v, plan.packed, empty_rows(count(plan.packed), k, dtype))
        keys = empty_rows(plan.keys, k, dtype)
        return post(link, packed, plan.sends, keys, plan.receives, tag=_KEYS), packed, keys


class _Return:
    """dK/dV of fetched rows on their way to their owners, who add them up."""

    def __init__(self, plan: FetchPlan, link: Link, dtype: torch.dtype) -> None:
        self._plan, self._link, self._dtype = plan, link, link.carried(dtype)
        self._coming: tuple[Transfer, Tensor, Tensor, Range] | None = None

    def send(self, dk: Tensor, dv: Tensor, groups: Range) -> None:
        """Start sending the gradients of a group of heads, dk and dv `[B, G, rows, H]` of all fetched rows."""
        plan, dtype = self._plan, self._dtype
        computed = pack(dk, dv, ((0, plan.keys),), empty_rows(plan.keys, dk, dtype))
        returned = empty_rows(rows_in(plan.returned), dk, dtype)
        transfer = post(self._link, computed, plan.receives, returned, plan.returned, tag=_GRADIENTS)
        self._coming = transfer, computed, returned, groups

    def add_home(self, grads: Gradients) -> None:
        """Wait for what other ranks computed of the group before, and add it to this rank's own."""
        if self._coming is None:
            return
        transfer, _, returned, (start, stop) = self._coming
        transfer.wait()
        for message, rows in zip(self._plan.returned, self._plan.home, strict=True):
            part = returned[message.rows[0] : message.rows[1]]
            add_rows(grads.dk[:, start:stop], grads.dv[:, start:stop], (rows,), part)
        self._coming = None
