"""What a rank has so far of its result and its gradients, while keys come in parts. Every context scheme uses it.

Shape letters: B rows, T tokens of this rank, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from torch import Tensor

from zoo.core.attention.evaluate import attend, attend_backward
from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.attention.slices import Slices, Step
from zoo.core.contracts.attention import AttentionBackend
from zoo.core.sequence.ranges import Range


class Result:
    """out `[B, N, T, H]` and lse `[B, N, T]` over the keys seen so far, merged in place in fp32 (fp64 stays)."""

    def __init__(
        self, backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, slices: Slices, *, scale: float
    ) -> None:
        """Start with the rank's own keys, k and v `[B, G, T, H]`."""
        self._backend, self._q, self._scale = backend, q, scale
        self._groups = k.shape[1]
        self.out, self.lse = attend(backend, q, k, v, slices, scale)

    def add(self, k: Tensor, v: Tensor, step: Step, *, groups: Range | None = None) -> None:
        """Add the keys of a step, k and v `[B, G, S, H]`, or of the key/value heads `groups` of them only."""
        if not step.slices:
            return
        self.out = self.out.to(accumulation_dtype(self.out.dtype))
        heads = _query_heads(self._q, self._groups, groups)
        q = _part(self._q, heads, step.queries)
        k, v = (_part(x, (0, x.shape[1]), step.keys).to(q.dtype) for x in (k, v))
        part = attend(self._backend, q, k, v, step.slices, self._scale)
        merge_(_part(self.out, heads, step.queries), _part(self.lse, heads, step.queries), *part)


class Gradients:
    """dq `[B, N, T, H]` over the keys seen so far and dk, dv of the own keys, all in fp32 (fp64 stays)."""

    def __init__(
        self,
        backend: AttentionBackend,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        slices: Slices,
        *,
        scale: float,
    ) -> None:
        """Start with the rank's own keys, k and v `[B, G, T, H]`; out and lse are those over all keys."""
        self._backend, self._scale, self._groups = backend, scale, k.shape[1]
        self._dout, self._q, self._out, self._lse = dout, q, out, lse
        grads = attend_backward(backend, dout, q, k, v, out, lse, slices, scale)
        # By the inputs' type: a kernel may return better, and ranks must agree on what travels.
        self.dq, self.dk, self.dv = (grad.to(accumulation_dtype(q.dtype)) for grad in grads)

    def add(self, k: Tensor, v: Tensor, step: Step, *, groups: Range | None = None) -> tuple[Tensor, Tensor]:
        """Add the keys of a step to dq; returns dk and dv of `step.keys`.

        k and v are `[B, G, S, H]`, or of the key/value heads `groups` only.
        """
        heads = _query_heads(self._q, self._groups, groups)
        k, v = (_part(x, (0, x.shape[1]), step.keys).to(self._q.dtype) for x in (k, v))
        if not step.slices:
            return k, v
        dout, q, out, lse = (_part(x, heads, step.queries) for x in (self._dout, self._q, self._out, self._lse))
        dq, dk, dv = attend_backward(self._backend, dout, q, k, v, out, lse, step.slices, self._scale)
        _part(self.dq, heads, step.queries).add_(dq)
        return dk, dv


def _query_heads(q: Tensor, num_groups: int, groups: Range | None) -> Range:
    """The query heads that share some key/value heads."""
    repeats = q.shape[1] // num_groups
    return (0, q.shape[1]) if groups is None else (groups[0] * repeats, groups[1] * repeats)


def _part(x: Tensor, heads: Range, rows: Range) -> Tensor:
    return x[:, heads[0] : heads[1], rows[0] : rows[1]]
