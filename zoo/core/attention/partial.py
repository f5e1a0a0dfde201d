"""What a rank has so far of its result and its gradients, while keys come in parts. Every context scheme uses it.

Shape letters: B rows, T tokens of this rank, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from torch import Tensor

from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.attention.ranges import Range
from zoo.core.attention.slices import Slices, Step
from zoo.core.contracts import AttentionBackend


class Result:
    """out `[B, N, T, H]` and lse `[B, N, T]` over the keys seen so far, merged in place in fp32 (fp64 stays)."""

    def __init__(
        self, backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, slices: Slices, *, scale: float
    ) -> None:
        """Start with the rank's own keys, k and v `[B, G, T, H]`."""
        self._backend, self._q, self._scale = backend, q, scale
        self.out, self.lse = backend.forward(q, k, v, slices, scale)

    def add(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Add the keys of a step, k and v `[B, G, S, H]`."""
        if not step.slices:
            return
        self.out = self.out.to(accumulation_dtype(self.out.dtype))
        q, k, v = _rows(self._q, step.queries), _rows(k, step.keys), _rows(v, step.keys)
        part = self._backend.forward(q, k, v, step.slices, self._scale)
        merge_(_rows(self.out, step.queries), _rows(self.lse, step.queries), *part)


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
        self._backend, self._scale = backend, scale
        self._dout, self._q, self._out, self._lse = dout, q, out, lse
        grads = backend.backward(dout, q, k, v, out, lse, slices, scale)
        self.dq, self.dk, self.dv = (grad.to(accumulation_dtype(grad.dtype)) for grad in grads)

    def add(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Add the keys of a step, k and v `[B, G, S, H]`, to dq; returns dk and dv of `step.keys`."""
        k, v = _rows(k, step.keys), _rows(v, step.keys)
        if not step.slices:
            return k, v
        dout, q, out, lse = (_rows(x, step.queries) for x in (self._dout, self._q, self._out, self._lse))
        dq, dk, dv = self._backend.backward(dout, q, k, v, out, lse, step.slices, self._scale)
        _rows(self.dq, step.queries).add_(dq)
        return dk, dv


def _rows(x: Tensor, rows: Range) -> Tensor:
    return x[:, :, rows[0] : rows[1]]
