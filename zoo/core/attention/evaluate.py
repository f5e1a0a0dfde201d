"""Slices of every rule by a kernel that knows full and causal ones.

An anti-causal triangle read backwards is a causal one: if row i sees keys i to the end, then with both orders
reversed row i sees keys 0 to i. So the lower edge of a sliding window costs a kernel nothing to support.
Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from zoo.core.attention.answers import check_attention, check_gradients, is_first
from zoo.core.attention.merge import accumulation_dtype, merge_
from zoo.core.attention.slices import Slices, Step
from zoo.core.contracts.attention import AttentionBackend, AttentionSlice, SliceRule
from zoo.core.sequence.ranges import Range


def attend(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, slices: Slices, scale: float
) -> tuple[Tensor, Tensor]:
    """`AttentionBackend.forward` for slices of any rule."""
    straight, inverse = _split(slices)
    result = backend.forward(q, k, v, straight, scale)
    if is_first(backend, "forward"):
        check_attention(backend, "forward", result, q)
    out, lse = result
    if inverse.slices:
        q, k, v = _reverse(q, inverse.queries), _reverse(k, inverse.keys), _reverse(v, inverse.keys)
        more_out, more_lse = backend.forward(q, k, v, inverse.slices, scale)
        out = out.to(accumulation_dtype(out.dtype))
        merge_(_rows(out, inverse.queries), _rows(lse, inverse.queries), more_out.flip(2), more_lse.flip(2))
    return out, lse


def attend_backward(
    backend: AttentionBackend,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slices: Slices,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`AttentionBackend.backward` for slices of any rule."""
    straight, inverse = _split(slices)
    grads = backend.backward(dout, q, k, v, out, lse, straight, scale)
    if is_first(backend, "backward"):
        check_gradients(backend, f"attention backend '{backend.name}'", "backward", grads, (q, k, v))
    if not inverse.slices:
        return grads
    dout, q, out, lse = (_reverse(x, inverse.queries) for x in (dout, q, out, lse))
    k, v = _reverse(k, inverse.keys), _reverse(v, inverse.keys)
    more = backend.backward(dout, q, k, v, out, lse, inverse.slices, scale)
    dq, dk, dv = (grad.to(accumulation_dtype(grad.dtype)) for grad in grads)
    for total, part, rows in zip((dq, dk, dv), more, (inverse.queries, inverse.keys, inverse.keys), strict=True):
        _rows(total, rows).add_(part.flip(2))
    return dq, dk, dv


@lru_cache(maxsize=256)
def _split(slices: Slices) -> tuple[Slices, Step]:
    """Slices a kernel takes as they are, and the others as it takes them once their rows are reversed."""
    straight = tuple(s for s in slices if s.rule is not SliceRule.ANTICAUSAL)
    if len(straight) == len(slices):
        return slices, Step((0, 0), (0, 0), ())
    step = Step.around([s for s in slices if s.rule is SliceRule.ANTICAUSAL])
    rows, keys = step.queries[1] - step.queries[0], step.keys[1] - step.keys[0]
    reversed_ = tuple(
        AttentionSlice(rows - s.q_stop, rows - s.q_start, keys - s.k_stop, keys - s.k_start, SliceRule.CAUSAL)
        for s in reversed(step.slices)
    )
    return straight, Step(step.queries, step.keys, reversed_)


def _rows(x: Tensor, rows: Range) -> Tensor:
    return x[:, :, rows[0] : rows[1]]


def _reverse(x: Tensor, rows: Range) -> Tensor:
    return _rows(x, rows).flip(2)
