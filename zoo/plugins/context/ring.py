"""The `ring` scheme: K/V travel from neighbour to neighbour while the last ones are used.

Ring Attention (Liu, Zaharia, Abbeel 2023) with head-tail balance and without rows that nobody further on needs.
Shape letters: B rows, T tokens of this rank, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from torch import Tensor

from zoo import AttentionBackend, AttentionProblem, HeadShape, Link, Mask, SequenceLayout
from zoo.core.attention.merge import accumulation_dtype
from zoo.core.attention.partial import Gradients, Result
from zoo.core.attention.wire import Transfer, add_rows, empty_rows, heads, pack, post
from zoo.core.sequence.ranges import Ranges, complement, count
from zoo.plugins.context.ring_plan import RingPass, RingPlan, ring_plan

_KEYS, _GRADIENTS = 0, 1


class Ring:
    """Ring attention over any backend, mask and degree, with two K/V buffers per rank."""

    name = "ring"
    splits_rows = True

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None: rings have no limits."""
        return None

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape) -> RingPlan:
        return ring_plan(mask, layout, rank, heads)

    def forward(
        self, backend: AttentionBackend, plan: RingPlan, link: Link, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        keys = _TravellingKeys(plan.forward, link, k, v)
        result = Result(backend, q, k, v, plan.own, scale=scale)
        for number, step in enumerate(plan.forward.steps):
            result.add(*keys.arrive(number), step)
        out = result.out.to(q.dtype)
        return out, (q, k, v, out, result.lse)

    def backward(
        self,
        backend: AttentionBackend,
        plan: RingPlan,
        link: Link,
        dout: Tensor,
        saved: tuple[Tensor, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        keys = _TravellingKeys(plan.backward, link, k, v)
        travelling = _TravellingGradients(plan.backward, link, k)
        gradients = Gradients(backend, dout, q, k, v, out, lse, plan.own, scale=scale)
        for number, step in enumerate(plan.backward.steps):
            travelling.send_on(number, *gradients.add(*keys.arrive(number), step))
        travelling.add_home(gradients.dk, gradients.dv)
        return gradients.dq, gradients.dk, gradients.dv


class _TravellingKeys:
    """K/V on their way round, in two buffers: one is computed with while the other fills."""

    def __init__(self, way: RingPass, link: Link, k: Tensor, v: Tensor) -> None:
        self._way, self._link = way, link
        packed = count(way.packed)
        even, odd = (packed, *way.rows[1::2]), way.rows[0::2]
        dtype = link.carried(k.dtype)
        self._buffers = [empty_rows(max(sizes, default=0), k, dtype) for sizes in (even, odd)]
        pack(k, v, way.packed, self._buffers[0])
        self._coming = self._post(0)

    def arrive(self, number: int) -> tuple[Tensor, Tensor]:
        """K and V of a step as `[B, G, rows, H]`; the next ones set out."""
        self._coming.wait()
        self._coming = self._post(number + 1)
        return heads(self._buffers[(number + 1) % 2][: self._way.rows[number]])

    def _post(self, number: int) -> Transfer:
        if number == len(self._way.hops):
            return Transfer()
        source, target = self._buffers[number % 2], self._buffers[1 - number % 2]
        hop = self._way.hops[number]
        return post(self._link, source, hop.sends, target, hop.receives, tag=_KEYS)


class _TravellingGradients:
    """dK/dV on their way to their owners, one step behind the keys: one buffer is sent while the other fills."""

    def __init__(self, way: RingPass, link: Link, k: Tensor) -> None:
        self._way, self._link = way, link
        sizes = (*way.gradient_rows, count(way.home))
        dtype = link.carried(accumulation_dtype(k.dtype))
        self._buffers = [empty_rows(max(part, default=0), k, dtype) for part in (sizes[0::2], sizes[1::2])]
        self._coming = Transfer()
        self._clear(0, ())

    def send_on(self, number: int, dk: Tensor, dv: Tensor) -> None:
        """Add dk and dv of a step to what earlier ranks sent of the same rows, and send the sum on."""
        self._coming.wait()
        sums = heads(self._buffers[number % 2])
        for (start, stop), (first, last) in self._way.seen[number]:
            for total, part in zip(sums, (dk, dv), strict=True):
                total[:, :, first:last].add_(part[:, :, start:stop])
        hop, source, target = self._way.gradient_hops[number], self._buffers[number % 2], self._buffers[1 - number % 2]
        self._clear(number + 1, tuple(message.rows for message in hop.receives))
        self._coming = post(self._link, source, hop.sends, target, hop.receives, tag=_GRADIENTS)

    def add_home(self, dk: Tensor, dv: Tensor) -> None:
        """Wait for this rank's own rows, now complete over all others, and add them to its own term."""
        self._coming.wait()
        add_rows(dk, dv, self._way.home, self._buffers[len(self._way.gradient_rows) % 2])

    def _clear(self, number: int, arriving: Ranges) -> None:
        """Zero the rows of a step's buffer that nothing will arrive for."""
        if number < len(self._way.gradient_rows):
            for start, stop in complement(arriving, self._way.gradient_rows[number]):
                self._buffers[number % 2][start:stop].zero_()
