"""The driver of attention backends: a kernel for one rectangle of scores becomes a backend over any slices.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zoo.core.attention.answers import check_attention, check_gradients, is_first
from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.contracts.attention import AttentionProblem, AttentionSlice, SliceRule

_Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]

MAX_STACKED_AREA = 1 << 14
"""Rectangles of at most this many scores are computed side by side; in larger ones a call costs nothing to speak of."""


class RectangleBackend(ABC):
    """An attention backend by two functions on one rectangle; slices, merging and accumulation come for free.

    Tensors have any strides but the last, which is 1. Grouped heads are not repeated: query head n reads head
    n // (N // G). If `causal`, queries and keys have the same length and row i sees keys 0 to i. Neither side is empty.
    Small slices of equal shape arrive together, as rows of a larger batch.
    """

    name: str

    @abstractmethod
    def supports(self, problem: AttentionProblem) -> str | None:
        """None if it can compute the problem, otherwise the reason why not."""

    @abstractmethod
    def rectangle_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q `[B, N, T, H]`, k and v `[B, G, S, H]` to out `[B, N, T, H]` and lse `[B, N, T]` in fp32 or better."""

    @abstractmethod
    def rectangle_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this rectangle; out and lse are those of the whole row, over all its keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[AttentionSlice], scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionBackend.forward`; out is what the kernel returns if one slice covers everything."""
        if _is_whole(slices, q, k):
            return self._forward(q, k, v, causal=slices[0].rule is SliceRule.CAUSAL, scale=scale)
        out, lse = _empty_result(q)
        for stack in _stacks(tuple(slices), q.device):
            part = self._forward(
                stack.queries.of(q), stack.keys.of(k), stack.keys.of(v), causal=stack.causal, scale=scale
            )
            if stack.fresh:
                stack.queries.put(out, part[0])
                stack.queries.put(lse, part[1])
            else:
                stack.queries.merge(out, lse, *part)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        slices: Sequence[AttentionSlice],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `AttentionBackend.backward`; gradients are what the kernel returns if one slice covers everything."""
        if _is_whole(slices, q, k):
            causal = slices[0].rule is SliceRule.CAUSAL
            return self._backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
        dq, dk, dv = (_zeros(x) for x in (q, k, v))
        for stack in _stacks(tuple(slices), q.device):
            queries, keys = stack.queries, stack.keys
            parts = self._backward(
                *(queries.of(x) for x in (dout, q)),
                *(keys.of(x) for x in (k, v)),
                *(queries.of(x) for x in (out, lse)),
                causal=stack.causal,
                scale=scale,
            )
            for rows, total, part in zip((queries, keys, keys), (dq, dk, dv), parts, strict=True):
                rows.add(total, part)
        return dq, dk, dv

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Look at the first rectangle's result: what is added up below would hide another shape or type."""
        result = self.rectangle_forward(q, k, v, causal=causal, scale=scale)
        if is_first(self, "rectangle_forward"):
            check_attention(self, "rectangle_forward", result, q)
        return result

    def _backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *final: Tensor, **how: Any) -> _Gradients:
        """As `_forward`; `final` is out and lse of the whole row."""
        grads = self.rectangle_backward(dout, q, k, v, *final, **how)
        if is_first(self, "rectangle_backward"):
            check_gradients(self, f"attention backend '{self.name}'", "rectangle_backward", grads, (q, k, v))
        return grads


@dataclass(frozen=True, slots=True)
class _Rows:
    """Runs of `size` rows of `[B, heads, T, ...]`, read as `[runs * B, heads, size, ...]` and written back."""

    starts: tuple[int, ...]
    size: int
    index: Tensor | None
    """All row numbers, if there are several runs."""

    @classmethod
    def of_runs(cls, starts: Sequence[int], size: int, device: torch.device) -> _Rows:
        if len(starts) == 1:
            return cls(tuple(starts), size, None)
        index = torch.tensor(starts)[:, None] + torch.arange(size)
        return cls(tuple(starts), size, index.flatten().to(device))

    def of(self, x: Tensor) -> Tensor:
        """The rows: a view of one run, a copy of several."""
        if self.index is None:
            return x.narrow(2, self.starts[0], self.size)
        rows = x.transpose(1, 2).index_select(1, self.index)
        return torch.unflatten(rows, 1, (len(self.starts), self.size)).flatten(0, 1).transpose(1, 2)

    def put(self, x: Tensor, part: Tensor) -> None:
        if self.index is None:
            self.of(x).copy_(part)
        else:
            x.transpose(1, 2).index_copy_(1, self.index, self._joined(part, x))

    def add(self, x: Tensor, part: Tensor) -> None:
        if self.index is None:
            self.of(x).add_(part)
        else:
            x.transpose(1, 2).index_add_(1, self.index, self._joined(part, x))

    def merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        rows = self.of(out), self.of(lse)
        merge_(*rows, more_out, more_lse)
        if self.index is not None:
            self.put(out, rows[0])
            self.put(lse, rows[1])

    def _joined(self, part: Tensor, like: Tensor) -> Tensor:
        rows = part.transpose(1, 2).to(like.dtype)
        return torch.unflatten(rows, 0, (-1, len(self.starts))).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Slices of one shape and rule, no query row twice, computed in one call."""

    queries: _Rows
    keys: _Rows
    causal: bool
    fresh: bool
    """Whether no stack before it has any of its query rows."""


@lru_cache(maxsize=256)
def _stacks(slices: tuple[AttentionSlice, ...], device: torch.device) -> tuple[_Stack, ...]:
    """The calls that compute some slices. Kept, because every layer of a step asks for the same ones."""
    seen = bytearray(max((s.q_stop for s in slices), default=0))
    stacks = []
    for found in _alike(slices):
        s = found[0]
        queries = _Rows.of_runs([x.q_start for x in found], s.q_stop - s.q_start, device)
        keys = _Rows.of_runs([x.k_start for x in found], s.k_stop - s.k_start, device)
        stacks.append(_Stack(queries, keys, s.rule is SliceRule.CAUSAL, _mark(seen, found)))
    return tuple(stacks)


def _mark(seen: bytearray, slices: Sequence[AttentionSlice]) -> bool:
    """Whether none of the slices' query rows was seen; from now on they are."""
    fresh = all(seen.find(1, s.q_start, s.q_stop) < 0 for s in slices)
    for s in slices:
        seen[s.q_start : s.q_stop] = b"\1" * (s.q_stop - s.q_start)
    return fresh


def _alike(slices: Sequence[AttentionSlice]) -> list[list[AttentionSlice]]:
    """Small slices of one shape and rule whose query rows are disjoint, together; all others alone."""
    groups: list[list[AttentionSlice]] = []
    opened: dict[tuple[int, int, SliceRule], list[list[AttentionSlice]]] = {}
    for s in sorted(slices, key=lambda s: (s.q_start, s.k_start)):
        shape = s.q_stop - s.q_start, s.k_stop - s.k_start, s.rule
        alike = opened.setdefault(shape, []) if shape[0] * shape[1] <= MAX_STACKED_AREA else []
        group = next((group for group in alike if group[-1].q_stop <= s.q_start), None)
        if group is None:
            group = []
            alike.append(group)
            groups.append(group)
        group.append(s)
    return groups


def _is_whole(slices: Sequence[AttentionSlice], q: Tensor, k: Tensor) -> bool:
    if len(slices) != 1:
        return False
    s = slices[0]
    return (s.q_start, s.q_stop, s.k_start, s.k_stop) == (0, q.shape[2], 0, k.shape[2])


def _zeros(x: Tensor) -> Tensor:
    """Zeros of `[B, heads, tokens, H]` laid out by tokens, as projections want them, in the accumulation dtype."""
    batch, heads, tokens, size = x.shape
    shape, dtype = (batch, tokens, heads, size), accumulation_dtype(x.dtype)
    return torch.zeros(shape, dtype=dtype, device=x.device).transpose(1, 2)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of rows that see no key."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    return _zeros(q), lse
