"""Contracts of attention: slices of scores, kernels that compute them, and context schemes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zoo.core.sequence.layout import SequenceLayout
    from zoo.core.sequence.mask import Mask


# Attention ----------------------------------------------------------------------------------------


class SliceRule(IntEnum):
    """Which keys of a slice's rectangle a query row sees."""

    FULL = 0
    """All of them."""
    CAUSAL = 1
    """Both ranges have the same length; row i sees keys 0 to i."""
    ANTICAUSAL = 2
    """Both ranges have the same length; row i sees keys i to the end. Core turns it into CAUSAL for kernels."""


class AttentionSlice(NamedTuple):
    """A rectangle of scores in local rows: queries `[q_start, q_stop)`, keys `[k_start, k_stop)`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    rule: SliceRule

    @property
    def area(self) -> int:
        """Number of scores the rule leaves visible."""
        rows, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return rows * keys if self.rule is SliceRule.FULL else rows * (rows + 1) // 2


class AttentionBackend(Protocol):
    """A kernel: attention over slices. Knows nothing of ranks, documents or layouts.

    Slices are FULL or CAUSAL. They may cover a query row several times (the result is the softmax over all its keys)
    or never (then out is 0 and lse is -inf). Grouped-query heads are not repeated: query head n reads head
    n // (N // G).
    """

    name: str

    def supports(self, problem: AttentionProblem) -> str | None:
        """None if it can compute the problem, otherwise the reason why not."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[AttentionSlice], scale: float
    ) -> tuple[Tensor, Tensor]:
        """q `[B, N, T, H]`, k and v `[B, G, S, H]`, last stride 1, to out `[B, N, T, H]` and lse `[B, N, T]`.

        lse is fp32 or better, so that partial results can be merged without loss; out too, unless the kernel itself
        rounds to q's dtype.
        """

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
        """Gradients of these slices given the row's *final* out and lse: dq, dk, dv, in dtypes as out's forward."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rank sends, in bytes, while it computes so many scores (visible pairs times query heads)."""

    sent: int
    scores: int


class ContextPlan(Protocol):
    """Everything a rank computes and sends for one mask, layout and shape of heads. Made on the host."""

    def stages(self, value_bytes: int, gradient_bytes: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Forward and backward as stages, one after another; bytes are those of one number of K/V and of dK/dV.

        They say for one row of a batch what will be sent and what hides it; tests hold the wire against them.
        """


class ContextScheme(Protocol):
    """How K/V or heads travel between the ranks of one context-parallel group."""

    name: str
    splits_rows: bool
    """Whether a rank computes the rows it holds. If not (heads are dealt out), the layout need not balance scores."""

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None if it can, otherwise the reason why not, with what to type instead."""

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape) -> ContextPlan:
        """Everything a rank computes and sends for this mask and layout. Host only, once per batch."""

    def forward(
        self, backend: AttentionBackend, plan: Any, link: Link, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """This rank's rows of q, k, v to its rows of out, and what backward needs.

        What backward needs ends with out and lse of the rows and heads that this rank computed.
        """

    def backward(
        self, backend: AttentionBackend, plan: Any, link: Link, dout: Tensor, saved: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of dq, dk, dv, complete over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a scheme is expected to cost one layer of one kind, forward and backward together."""

    sent: tuple[int, int]
    """Bytes that the busiest rank sends, forward and backward."""
    hidden: float
    """Share of the time on the wire that computation hides."""
    seconds: float
    compute_seconds: float
    """Of these, what computation alone would take on the busiest rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """The heads of one attention layer, as a rank holds them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """From the hub's fields of a config whose layers are all alike."""
        return cls(
            num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim
        )

    def over(self, degree: int) -> HeadShape:
        """What a rank holds where heads are dealt out over so many ranks; all where that is not possible."""
        if self.num_heads % degree or self.num_kv_heads % degree:
            return self
        return replace(self, num_heads=self.num_heads // degree, num_kv_heads=self.num_kv_heads // degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """What an attention backend is asked to compute, for `supports`."""

    device: str
    """torch device type: `cpu`, `cuda`."""
    dtype: str
    """`float64`, `float32`, `bfloat16`, `float16`."""
    head_dim: int
    num_heads: int
    num_kv_heads: int
    deterministic: bool = False
    """Whether gradients must have the same bits each time."""

    @property
    def heads(self) -> HeadShape:
        return HeadShape(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def of(self, heads: HeadShape) -> AttentionProblem:
        """The same with other heads."""
        return replace(self, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim)


@dataclass(frozen=True, slots=True)
class Link:
    """The ranks of one context-parallel group, and the type in which numbers travel between them."""

    group: ProcessGroup
    dtype: torch.dtype | None = None
    """None: K/V in their own type, sums of gradients in fp32 (fp64 stays). bfloat16 halves the traffic of fp32."""

    def carried(self, dtype: torch.dtype) -> torch.dtype:
        """The type on the wire of numbers of a type: never a wider one."""
        return self.dtype if self.dtype is not None and self.dtype.itemsize < dtype.itemsize else dtype
