"""The loss seam under tensor parallelism: a head cut along the vocabulary, whose logits are never gathered.

R rows that are trained on, D model width, V vocabulary, P ranks of `tp`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from zoo import IGNORE
from zoo.plugins.parallel.tensor.modules import here
from zoo.plugins.parallel.tensor.ranks import TensorRanks

_CHUNK_VALUES = {"cpu": 1 << 23}
_CHUNK_VALUES_ACCELERATOR = 1 << 27
_LEAST_ROWS = 64


class VocabularyLoss(nn.Module):
    """Hidden states and this rank's rows of the head to the sum of the token losses.

    A chunk has as many logits on a rank as a chunk of the single device's loss; of each row three numbers are reduced:
    the largest logit, then the sum of exponentials and the target's logit.
    """

    def __init__(self, ranks: TensorRanks) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden as the residual lies, weight `[V, D]` cut on V, labels `[B, T]` to a 0-dim sum in fp32 or better.

        It is the whole sum on the first rank and 0 on the others, for what ranks return is added up; gradients are the
        whole sum's on all of them. IGNORE adds 0.
        """
        self.ranks.row_of(labels.shape[1])
        rows, targets = self.ranks.enter(hidden).flatten(0, 1), labels.flatten()
        if targets.device.type == "cpu":
            # Elsewhere the number of trained rows is not known without waiting for the device.
            kept = targets != IGNORE
            rows, targets = rows[kept], targets[kept]
        local, with_grad = here(weight), torch.is_grad_enabled()
        total: Tensor = _ChunkedLoss.apply(rows, local, targets, self.ranks.group, with_grad)  # type: ignore[no-untyped-call]
        return total


class _ChunkedLoss(Function):
    """Gradients are computed along with the loss and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, group: ProcessGroup, with_grad: bool
    ) -> Tensor:
        exact = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=rows.device)
        drows = torch.empty_like(rows) if with_grad and ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=exact) if with_grad and ctx.needs_input_grad[1] else None
        size = chunk_rows(weight.shape[0], rows.device.type)
        for start in range(0, rows.shape[0], size):
            part = slice(start, start + size)
            loss, dlogits = _chunk(rows[part], weight, targets[part], group, exact)
            total += loss
            if drows is not None:
                torch.mm(dlogits, weight, out=drows[part])
            if dweight is not None:
                dweight += torch.mm(dlogits.t(), rows[part])
        ctx.gradients = drows, None if dweight is None else dweight.to(weight.dtype)
        return total if group.rank() == 0 else total * 0.0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss frees its gradients in backward: call backward once")
        drows, dweight = (None if g is None else g.mul_(dtotal) for g in ctx.gradients)
        ctx.gradients = None
        return drows, dweight, None, None, None


def chunk_rows(words: int, device: str) -> int:
    """Rows of a chunk for so many words of the vocabulary: 32 MiB of fp32 logits on a CPU, 512 MiB elsewhere."""
    return max(_LEAST_ROWS, _CHUNK_VALUES.get(device, _CHUNK_VALUES_ACCELERATOR) // words)


def _chunk(
    rows: Tensor, weight: Tensor, targets: Tensor, group: ProcessGroup, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The chunk's loss, and the gradient of this rank's logits in the rows' dtype, softmax minus one-hot."""
    logits = torch.mm(rows, weight.t()).to(exact)
    highest = logits.amax(1)
    dist.all_reduce(highest, ReduceOp.MAX, group=group)
    valid = (targets != IGNORE).to(exact)
    local = targets - group.rank() * weight.shape[0]
    # IGNORE is below every word's number, so it is nowhere present.
    present = (local >= 0) & (local < weight.shape[0])
    index, mine = local.where(present, 0)[:, None], present.to(exact)
    exponentials = logits.sub_(highest[:, None])
    chosen = exponentials.gather(1, index)[:, 0] * mine
    exponentials.exp_()
    sums = torch.stack((exponentials.sum(1), chosen))
    dist.all_reduce(sums, group=group)
    total, chosen = sums.unbind()
    loss = ((total.log() - chosen) * valid).sum()
    dlogits = exponentials.mul_((valid / total)[:, None]).scatter_add_(1, index, -mine[:, None])
    return loss, dlogits.to(rows.dtype)
