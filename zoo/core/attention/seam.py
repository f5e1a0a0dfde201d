"""The module that stands in every model's `attention` seam: one autograd function over any backend and scheme.

Shape letters: B rows, T tokens of this rank, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from zoo.core.attention.answers import check_exchanged, check_gradients, is_first
from zoo.core.attention.evaluate import attend, attend_backward
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.attention.slices import Slices, local_slices
from zoo.core.contracts.attention import AttentionBackend, ContextPlan, HeadShape
from zoo.core.errors import UsageError
from zoo.core.sequence.mask import Mask


class AttentionSeam(nn.Module):
    """Attention of a row, or, with an exchange, of this rank's part of a row. Holds no parameters."""

    def __init__(
        self, backend: AttentionBackend, exchange: Exchange | None = None, *, window: int | None = None
    ) -> None:
        """`window` is this layer's sliding window in tokens, the token itself included; None shows everything."""
        super().__init__()
        self.backend = backend
        self.exchange = exchange
        self.window = window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | ShardedMask | None = None, *, scale: float | None = None
    ) -> Tensor:
        """q `[B, N, T, H]`, k and v `[B, G, T, H]` to out `[B, N, T, H]` in q's dtype.

        `mask` holds for every row of the batch; None is one causal document. With an exchange it is the
        `ShardedMask` that the context adapter made. `scale` multiplies the scores q @ k^T before the softmax; None is
        `H ** -0.5`. Raises UsageError if mask and tensors differ in length or the mask is of the other kind.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        heads = HeadShape(num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[3])
        out: Tensor = _Attention.apply(q, k, v, self._run(mask, q.shape[2], heads), scale)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        scheme = f", scheme={self.exchange.scheme.name}" if self.exchange else ""
        window = f", window={self.window}" if self.window else ""
        return f"backend={self.backend.name}{scheme}{window}"

    def _run(self, mask: Mask | ShardedMask | None, length: int, heads: HeadShape) -> _Local | _Exchanged:
        if mask is not None and mask.length != length:
            raise UsageError(f"attention got {length} tokens and a mask of {mask.length}: pass the batch's own mask")
        if self.exchange is not None and isinstance(mask, ShardedMask):
            return _Exchanged(self.backend, self.exchange, mask.plan(self.exchange.scheme, self.window, heads))
        if self.exchange is None and not isinstance(mask, ShardedMask):
            return _Local(self.backend, _whole_row((mask or Mask.whole(length)).with_window(self.window)))
        raise UsageError(
            f"attention {'under context parallelism' if self.exchange else 'over a whole row'} was given a mask of "
            f"type {type(mask).__name__}: with --cp, and only then, pass batches through the adapter's shard_batch"
        )


@lru_cache(maxsize=8)
def _whole_row(mask: Mask) -> Slices:
    return local_slices(mask, ((0, mask.length),))


class _Local:
    """All keys are here."""

    def __init__(self, backend: AttentionBackend, slices: Slices) -> None:
        self.backend, self.slices = backend, slices

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, lse = attend(self.backend, q, k, v, self.slices, scale)
        out = out.to(q.dtype)
        return out, (q, k, v, out, lse)

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        return attend_backward(self.backend, dout, q, k, v, out, lse, self.slices, scale)


class _Exchanged:
    """Some keys are on other ranks."""

    def __init__(self, backend: AttentionBackend, exchange: Exchange, plan: ContextPlan) -> None:
        self.backend, self.scheme, self.link, self.plan = backend, exchange.scheme, exchange.link, plan

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = self.scheme.forward(self.backend, self.plan, self.link, q, k, v, scale)
        self.keys = k.shape
        if is_first(self.scheme, "forward"):
            check_exchanged(self.scheme, result, q)
        return result

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        grads = self.scheme.backward(self.backend, self.plan, self.link, dout, saved, scale)
        if is_first(self.scheme, "backward"):
            keys = dout.new_empty(1).expand(self.keys)
            check_gradients(self.scheme, f"context scheme '{self.scheme.name}'", "backward", grads, (dout, keys, keys))
        return grads


class _Attention(Function):
    """Saves what the run says, q, k, v, out and lse as a rule: scores are recomputed backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, run: _Local | _Exchanged, scale: float) -> Tensor:
        out, saved = run.forward(_unit_stride(q), _unit_stride(k), _unit_stride(v), scale)
        ctx.save_for_backward(*saved)
        ctx.run, ctx.scale, ctx.dtypes = run, scale, (q.dtype, k.dtype, v.dtype)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.run.backward(_unit_stride(dout), ctx.saved_tensors, ctx.scale)
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels read the vector of a head as dense memory; torch's CPU kernel does so without checking."""
    return x if x.stride(-1) == 1 else x.contiguous()
