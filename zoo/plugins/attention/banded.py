"""The driver of kernels that compute several slices in one launch: they say which, this merges what they return.

Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zoo import AttentionProblem, AttentionSlice
from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.sequence.ranges import Range
from zoo.plugins.attention.bands import Band, Launch, box, launches, shifted


class BandedBackend(ABC):
    """An attention backend by two functions on a launch, and the rule of what fits into one.

    A launch's rows without keys have out 0 and lse -inf, and all gradients that are not theirs are 0.
    """

    name: str

    @abstractmethod
    def supports(self, problem: AttentionProblem) -> str | None:
        """None if it can compute the problem, otherwise the reason why not."""

    @staticmethod
    @abstractmethod
    def may_follow(last: Band, band: Band) -> bool:
        """Whether a launch that ends with one band can go on with another, whose queries do not start earlier."""

    @abstractmethod
    def launch_forward(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        """q `[B, N, T, H]`, k and v `[B, G, S, H]` to out `[B, N, T, H]` and lse `[B, N, T]` in fp32 or better."""

    @abstractmethod
    def launch_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this launch; out and lse are those of the whole row, over all its keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[AttentionSlice], scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionBackend.forward`; out is what the kernel returns if one launch does everything."""
        parts = _parts(self.may_follow, tuple(slices))
        if len(parts) == 1:
            return self.launch_forward(q, k, v, parts[0].whole, scale)
        out = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
        lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
        for part in parts:
            queries, keys = part.queries, part.keys
            more = self.launch_forward(_cut(q, queries), _cut(k, keys), _cut(v, keys), part.launch, scale)
            merge_(_cut(out, queries), _cut(lse, queries), *more)
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
        """As `AttentionBackend.backward`; gradients are what the kernel returns if one launch does everything."""
        parts = _parts(self.may_follow, tuple(slices))
        dout, out = dout.to(q.dtype), out.to(q.dtype)
        if len(parts) == 1:
            return self.launch_backward(dout, q, k, v, out, lse, parts[0].whole, scale)
        dq, dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (q, k, v))
        for part in parts:
            queries, keys = part.queries, part.keys
            cut_dout, cut_q, cut_out, cut_lse = (_cut(x, queries) for x in (dout, q, out, lse))
            cut_k, cut_v = _cut(k, keys), _cut(v, keys)
            grads = self.launch_backward(cut_dout, cut_q, cut_k, cut_v, cut_out, cut_lse, part.launch, scale)
            for total, rows, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
                _cut(total, rows).add_(grad)
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _Part:
    """A launch, in all rows and in those of its box."""

    whole: Launch
    launch: Launch
    queries: Range
    keys: Range


@lru_cache(maxsize=256)
def _parts(may_follow: Callable[[Band, Band], bool], slices: tuple[AttentionSlice, ...]) -> tuple[_Part, ...]:
    """The launches that compute some slices. Kept, because every layer of a step asks for the same ones."""
    parts = []
    for launch in launches(slices, may_follow):
        queries, keys = box(launch)
        parts.append(_Part(launch, shifted(launch, queries[0], keys[0]), queries, keys))
    return tuple(parts)


def _cut(x: Tensor, rows: Range) -> Tensor:
    return x[:, :, rows[0] : rows[1]]
