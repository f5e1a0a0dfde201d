"""The `allgather` scheme: each rank fetches every K/V row its queries see, at once and from its owner.

Only visible rows are fetched, so packed documents cost what they share and no more. Messages go straight from the
packed K/V into place at the reader: an `all_to_all` (which NCCL builds from the same messages) would need a copy of
the rows for each reader first. Shape letters: B rows, T tokens of this rank, G key/value heads, H head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from zoo.core.attention.layout import SequenceLayout, head_tail_problem
from zoo.core.attention.mask import Mask
from zoo.core.attention.merge import accumulation_dtype
from zoo.core.attention.partial import Gradients, Result
from zoo.core.attention.ranges import count
from zoo.core.attention.wire import Transfer, add_rows, empty_rows, heads, pack, post, rows_in
from zoo.core.contracts import AttentionBackend, AttentionProblem
from zoo.plugins.context.allgather_plan import AllgatherPlan, allgather_plan


class Allgather:
    """Attention over fetched keys, with any backend, mask and degree. Own keys are used while the others travel."""

    name = "allgather"

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None, or why the length cannot be cut into equal head-tail pairs, with the nearest that can."""
        return head_tail_problem(length, degree)

    def layout(self, length: int, degree: int) -> SequenceLayout:
        """Head-tail: causal work is the same on every rank."""
        return SequenceLayout.head_tail(length, degree)

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int) -> AllgatherPlan:
        return allgather_plan(mask, layout, rank)

    def forward(
        self,
        backend: AttentionBackend,
        plan: AllgatherPlan,
        group: ProcessGroup,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        fetched = _Fetch(plan, group, k, v)
        result = Result(backend, q, k, v, plan.own, scale=scale)
        result.add(*fetched.wait(), plan.step)
        return result.out, result.lse

    def backward(
        self,
        backend: AttentionBackend,
        plan: AllgatherPlan,
        group: ProcessGroup,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fetched = _Fetch(plan, group, k, v)
        grads = Gradients(backend, dout, q, k, v, out, lse, plan.own, scale=scale)
        _give_back(plan, group, grads, *grads.add(*fetched.wait(), plan.step))
        return grads.dq, grads.dk, grads.dv


class _Fetch:
    """K/V rows on their way from their owners to their readers."""

    def __init__(self, plan: AllgatherPlan, group: ProcessGroup, k: Tensor, v: Tensor) -> None:
        self._packed = pack(k, v, plan.packed, empty_rows(count(plan.packed), k))
        self._keys = empty_rows(plan.keys, k)
        self._transfer: Transfer = post(group, self._packed, plan.sends, self._keys, plan.receives)

    def wait(self) -> tuple[Tensor, Tensor]:
        """K and V as `[B, G, rows, H]`, in order of position."""
        self._transfer.wait()
        return heads(self._keys)


def _give_back(plan: AllgatherPlan, group: ProcessGroup, grads: Gradients, dk: Tensor, dv: Tensor) -> None:
    """Return dk and dv of fetched rows to their owners, which add them up in fp32 (fp64 stays)."""
    dtype = accumulation_dtype(dk.dtype)
    computed = pack(dk, dv, ((0, plan.keys),), empty_rows(plan.keys, dk, dtype))
    returned = empty_rows(rows_in(plan.returned), dk, dtype)
    post(group, computed, plan.receives, returned, plan.returned).wait()
    for message, rows in zip(plan.returned, plan.home, strict=True):
        add_rows(grads.dk, grads.dv, (rows,), returned[message.rows[0] : message.rows[1]])
