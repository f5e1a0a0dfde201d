"""The contract of attention backends, as tests that a plugin's author inherits.

    from zoo.testing.attention import AttentionContract

    class TestMine(AttentionContract):
        @pytest.fixture
        def backend(self):
            return Mine()

Shape letters: B rows, T tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zoo import AttentionBackend, AttentionProblem, Mask, SequenceLayout, local_slices, remote_slices
from zoo.core.attention.partial import Gradients, Result
from zoo.core.attention.slices import Step
from zoo.core.sequence.ranges import Ranges, complement, union

SHAPES = ((1, 1, 1, 16), (1, 4, 4, 16), (2, 4, 2, 32), (1, 6, 1, 8))
"""B, N, G, H: one head, equal heads, grouped heads in a batch, one key/value head for all."""

MASKS = {
    "one document": Mask.whole(96),
    "packed with padding": Mask(96, ((0, 7), (7, 50), (51, 52), (60, 91))),
    "tiny documents": Mask(96, tuple((at, at + 3) for at in range(0, 96, 3))),
    "only padding": Mask(96, ()),
    "not causal": Mask(96, ((0, 40), (40, 90)), causal=False),
    "prefixes": Mask(96, ((0, 40), (40, 90)), prefixes=(13, 50)),
    "a window": Mask.whole(96, window=17),
    "a window over documents": Mask(96, ((0, 7), (7, 50), (51, 52), (60, 91)), window=8),
}

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """An input with its gradient from above, and the scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    scale: float

    @classmethod
    def random(cls, shape: tuple[int, int, int, int], tokens: int, *, dtype: torch.dtype, device: str) -> Example:
        """q, k, v and dout laid out as a projection leaves them: `[B, T, heads, H]` in memory."""
        batch, heads, groups, size = shape
        generator = torch.Generator().manual_seed(tokens * heads + size)

        def draw(n: int) -> Tensor:
            x = torch.randn(batch, tokens, n, size, generator=generator, dtype=torch.float64)
            return x.to(device, dtype).transpose(1, 2)

        return cls(q=draw(heads), k=draw(groups), v=draw(groups), dout=draw(heads), scale=size**-0.5)


class AttentionContract:
    """What every backend must do: out, dq, dk and dv equal the formula's, whole or shared out over ranks."""

    device: ClassVar[str] = "cpu"
    tolerances: ClassVar[dict[str, float]] = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 6e-2}
    """Largest error allowed per dtype, inputs being of size 1. Dtypes the backend does not support are skipped."""

    __test__ = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = True

    @pytest.fixture
    def backend(self) -> AttentionBackend:
        raise NotImplementedError("give the subclass a fixture `backend` that returns an instance of yours")

    def test_supports_some_dtype_and_says_why_not_otherwise(self, backend: AttentionBackend) -> None:
        answers = [backend.supports(self._problem(dtype, SHAPES[2])) for dtype in self.tolerances]
        assert None in answers, answers
        assert all(answer is None or len(answer.split()) > 2 for answer in answers), answers

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", tolerances)
    def test_equals_the_formula(
        self, backend: AttentionBackend, dtype: str, shape: tuple[int, int, int, int], mask: Mask
    ) -> None:
        self._compare(backend, dtype, shape, mask, degree=1)

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
    @pytest.mark.parametrize("degree", [2, 4])
    @pytest.mark.parametrize("dtype", tolerances)
    def test_equals_the_formula_when_shared_out(
        self, backend: AttentionBackend, dtype: str, degree: int, mask: Mask
    ) -> None:
        self._compare(backend, dtype, SHAPES[2], mask, degree=degree)

    def test_rows_without_keys_are_zero_with_minus_infinity(self, backend: AttentionBackend) -> None:
        dtype = next(d for d in self.tolerances if backend.supports(self._problem(d, SHAPES[2])) is None)
        x = Example.random(SHAPES[2], 96, dtype=getattr(torch, dtype), device=self.device)
        mask = MASKS["packed with padding"]
        out, lse = backend.forward(x.q, x.k, x.v, local_slices(mask, ((0, 96),)), x.scale)
        for start, stop in complement(mask.documents, 96):
            assert (out[:, :, start:stop] == 0).all()
            assert (lse[:, :, start:stop] == -torch.inf).all()
        assert lse.dtype in (torch.float32, torch.float64)

    def _problem(self, dtype: str, shape: tuple[int, int, int, int]) -> AttentionProblem:
        _, heads, groups, size = shape
        return AttentionProblem(device=self.device, dtype=dtype, head_dim=size, num_heads=heads, num_kv_heads=groups)

    def _compare(
        self, backend: AttentionBackend, dtype: str, shape: tuple[int, int, int, int], mask: Mask, *, degree: int
    ) -> None:
        reason = backend.supports(self._problem(dtype, shape))
        if reason is not None or dtype not in self.tolerances:
            pytest.skip(reason or f"no tolerance for {dtype}")
        x = Example.random(shape, mask.length, dtype=getattr(torch, dtype), device=self.device)
        layout = SequenceLayout.head_tail(mask.length, degree)
        for got, wanted in zip(shared_attention(backend, x, mask, layout), reference(x, mask), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=self.tolerances[dtype])


def reference(x: Example, mask: Mask) -> Tensors:
    """out, dq, dk, dv by the formula in fp64, with the mask as a matrix and torch's autograd."""
    q, k, v = (t.detach().double().requires_grad_() for t in (x.q, x.k, x.v))
    repeats = q.shape[1] // k.shape[1]
    visible = visible_matrix(mask).to(q.device)
    scores = q @ k.repeat_interleave(repeats, 1).transpose(-1, -2) * x.scale
    # A finite minimum keeps rows without keys free of NaN; the product with `visible` makes them zero.
    weights = scores.masked_fill(~visible, -1e300).softmax(-1) * visible
    out = weights @ v.repeat_interleave(repeats, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout.double())


def reference_lse(x: Example, mask: Mask) -> Tensor:
    """lse `[B, N, T]` by the formula in fp64; -inf for rows without keys."""
    repeats = x.q.shape[1] // x.k.shape[1]
    scores = x.q.double() @ x.k.double().repeat_interleave(repeats, 1).transpose(-1, -2) * x.scale
    return scores.masked_fill(~visible_matrix(mask).to(x.q.device), -torch.inf).logsumexp(-1)


def visible_matrix(mask: Mask) -> Tensor:
    """The mask from its definition, `[length, length]`: query i sees key j."""
    visible = torch.zeros(mask.length, mask.length, dtype=torch.bool)
    for number, (start, stop) in enumerate(mask.documents):
        block = torch.ones(stop - start, stop - start, dtype=torch.bool)
        if mask.causal:
            block = block.tril()
        if mask.window is not None:
            block = block.triu(1 - mask.window)
        if mask.prefixes:
            block[:, : mask.prefixes[number]] = True
        visible[start:stop, start:stop] = block
    return visible


def shared_attention(backend: AttentionBackend, x: Example, mask: Mask, layout: SequenceLayout) -> Tensors:
    """out, dq, dk, dv as the ranks of a layout compute them, one after another in this process."""
    outs, dqs = [], []
    dk, dv = (torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in (x.k, x.v))
    for rank, chunks in enumerate(layout.chunks):
        others = union(part for r, parts in enumerate(layout.chunks) if r != rank for part in parts)
        step = Step.around(remote_slices(mask, chunks, others))
        q, k, v, dout = (layout.take(t, rank, 2) for t in (x.q, x.k, x.v, x.dout))
        far_k, far_v = _rows(x.k, others), _rows(x.v, others)
        own = local_slices(mask, chunks)
        result = Result(backend, q, k, v, own, scale=x.scale)
        result.add(far_k, far_v, step)
        grads = Gradients(backend, dout, q, k, v, result.out.to(q.dtype), result.lse, own, scale=x.scale)
        far = grads.add(far_k, far_v, step)
        outs.append(result.out)
        dqs.append(grads.dq)
        for total, near, part in zip((dk, dv), (grads.dk, grads.dv), far, strict=True):
            total.index_add_(2, _positions(chunks, near), near.double())
            if step.slices:
                total.index_add_(2, _positions(others, part)[slice(*step.keys)], part.double())
    return layout.join(outs, 2), layout.join(dqs, 2), dk, dv


def _rows(x: Tensor, rows: Ranges) -> Tensor:
    return torch.cat([x[:, :, :0], *(x[:, :, start:stop] for start, stop in rows)], 2)


def _positions(rows: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=like.device) for start, stop in rows])
