"""The `ring` scheme: K/V travel from neighbour to neighbour while the last ones are used.

Ring Attention (Liu, Zaharia, Abbeel 2023) with head-tail balance and without rows that nobody further on needs.
Shape letters: B rows, T tokens of this rank, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from zoo.core.attention.layout import SequenceLayout, head_tail_problem
from zoo.core.attention.mask import Mask
from zoo.core.attention.merge import accumulation_dtype
from zoo.core.attention.partial import Gradients, Result
from zoo.core.attention.ranges import Ranges, complement, count
from zoo.core.attention.wire import Transfer, add_rows, empty_rows, heads, pack, post
from zoo.core.contracts import AttentionBackend, AttentionProblem
from zoo.plugins.context.ring_plan import RingPass, RingPlan, ring_plan

_KEYS, _GRADIENTS = 0, 1


class Ring:
    """Ring attention over any backend, mask and degree, with two K/V buffers per rank."""

    name = "ring"

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None, or why the length cannot be cut into equal head-tail pairs, with the nearest that can."""
        return head_tail_problem(length, degree)

    def layout(self, length: int, degree: int) -> SequenceLayout:
        """Head-tail: causal work is the same on every rank, and a quarter of the traffic falls away."""
        return SequenceLayout.head_tail(length, degree)

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int) -> RingPlan:
        return ring_plan(mask, layout, rank)

    def forward(
        self,
        backend: AttentionBackend,
        plan: RingPlan,
        group: ProcessGroup,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        keys = _TravellingKeys(plan.forward, group, k, v)
        result = Result(backend, q, k, v, plan.own, scale=scale)
        for number, step in enumerate(plan.forward.steps):
            result.add(*keys.arrive(number), step)
        return result.out, result.lse

    def backward(
        self,
        backend: AttentionBackend,
        plan: RingPlan,
        group: ProcessGroup,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = _TravellingKeys(plan.backward, group, k, v)
        travelling = _TravellingGradients(plan.backward, group, k)
        gradients = Gradients(backend, dout, q, k, v, out, lse, plan.own, scale=scale)
        for number, step in enumerate(plan.backward.steps):
            travelling.send_on(number, *gradients.add(*keys.arrive(number), step))
        travelling.add_home(gradients.dk, gradients.dv)
        return gradients.dq, gradients.dk, gradients.dv


class _TravellingKeys:
    """K/V on their way round, in two buffers: one is computed with while the other fills."""

    def __init__(self, way: RingPass, group: ProcessGroup, k: Tensor, v: Tensor) -> None:
        self._way, self._group = way, group
        packed = count(way.packed)
        even, odd = (packed, *way.rows[1::2]), way.rows[0::2]
        self._buffers = [empty_rows(max(sizes, default=0), k) for sizes in (even, odd)]
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
        return post(self._group, source, hop.sends, target, hop.receives, tag=_KEYS)


class _TravellingGradients:
    """dK/dV on their way to their owners, one step behind the keys: one buffer is sent while the other fills."""

    def __init__(self, way: RingPass, group: ProcessGroup, k: Tensor) -> None:
        self._way, self._group = way, group
        sizes = (*way.gradient_rows, count(way.home))
        dtype = accumulation_dtype(k.dtype)
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
        self._coming = post(self._group, source, hop.sends, target, hop.receives, tag=_GRADIENTS)

    def add_home(self, dk: Tensor, dv: Tensor) -> None:
        """Wait for this rank's own rows, now complete over all others, and add them to its own term."""
        self._coming.wait()
        add_rows(dk, dv, self._way.home, self._buffers[len(self._way.gradient_rows) % 2])

    def _clear(self, number: int, arriving: Ranges) -> None:
        """Zero the rows of a step's buffer that nothing will arrive for."""
        if number < len(self._way.gradient_rows):
            for start, stop in complement(arriving, self._way.gradient_rows[number]):
                self._buffers[number % 2][start:stop].zero_()
