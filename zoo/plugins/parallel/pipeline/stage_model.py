"""One stage of a pipeline as a module: a view of the rank's model, called by the number of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo import Counts, RouterStats, Sums, UsageError
from zoo.core.model.answers import check_losses
from zoo.core.run.forward_backward import as_losses
from zoo.plugins.parallel.pipeline.cut import Partition

if TYPE_CHECKING:
    from zoo import Batch


class StageModel(nn.Module):
    """One stage: microbatch by number and hidden states to hidden states, or to a part of the loss."""

    def __init__(self, view: nn.Module, cut: Partition, index: int, family: str = "") -> None:
        super().__init__()
        self.view = view
        self.index = index
        self.is_first, self.is_last = index == 0, index == cut.num_stages - 1
        self.sums = [module for module in view.modules() if isinstance(module, CarriedSum)]
        self.before_last_backward: Callable[[], None] | None = None
        """Called when a step's last backward of this stage begins, if its schedule does not split that."""
        self._family = family
        self._looked = False
        self._step: tuple[Sequence[Batch], Counts, Sums] | None = None

    def begin(self, batches: Sequence[Batch], counts: Counts, sums: Sums) -> None:
        """Set what the numbers mean and where losses and reports go."""
        self._step = batches, counts, sums

    def forward(self, hidden: Tensor, *carried: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        """hidden `[B, T, D]`, or anything on the first stage; sums of `CarriedSum`; and a number `[1]` on the host.

        To hidden states and sums for the next stage, or to a microbatch's part of the loss, 0-dim.
        """
        assert self._step is not None, "begin comes first"
        batches, counts, sums = self._step
        batch = batches[int(number)]
        for seam in self.sums:
            seam.carried = carried
        entry = batch.tokens if self.is_first else hidden
        losses = as_losses(self.view(entry, batch.positions, batch.mask, batch.labels))
        call = self.before_last_backward
        # Microbatches go back in the order in which they came.
        if call is not None and int(number) == len(batches) - 1:
            losses.tokens.register_hook(lambda _gradient: call())  # type: ignore[no-untyped-call]
        if isinstance(losses.rows, Tensor) and not self.sums:
            raise UsageError("--pp: this model's loss over rows needs all blocks, and its plan has no seam 'layer_sum'")
        # Only the last stage knows all blocks; the others report the same names.
        sums.add_report(losses, batch, counts, weight=float(self.is_last))
        if not self.is_last:
            return (losses.tokens, *(value for seam in self.sums for value in seam.carried))
        if not self._looked:
            check_losses(self._family, self.view, losses, batch.tokens.device)
            self._looked = True
        loss = counts.loss(losses, batch)
        sums.add_loss(loss)
        return loss


def stage_view(model: nn.Module, cut: Partition, stage: int, splits: bool) -> nn.Module:
    """The model of one stage, sharing modules with that of the rank: a block of another stage is not in it."""
    blocks = {name for other in cut.blocks for name in other} - set(cut.blocks[stage])
    is_first, is_last = stage == 0, stage == cut.num_stages - 1
    passed = {*(() if is_first else cut.first), *(() if is_last else cut.last)}

    def copy(name: str) -> nn.Module:
        old = model.get_submodule(name)
        # Of its class before FSDP2, whose modules cannot be copied; hooks come along and act on the original.
        new: nn.Module = object.__new__(cut.classes[name])
        new.__dict__.update(old.__dict__)
        children: dict[str, nn.Module] = {}
        for leaf, child in old.named_children():
            full = f"{name}.{leaf}" if name else leaf
            if full in passed:
                children[leaf] = PassThrough()
            elif full in cut.classes:
                children[leaf] = copy(full)
            elif full not in blocks:
                children[leaf] = child
        new.__dict__["_modules"] = children
        return new

    view = copy("")
    for name in cut.loss if is_last and splits else ():
        view.set_submodule(name, RepeatableLoss(view.get_submodule(name)))
    for name in cut.layer_sum:
        view.set_submodule(name, CarriedSum(view.get_submodule(name)))
    for name in () if is_last else cut.row_sum:
        view.set_submodule(name, PassThrough())
    return view


class PassThrough(nn.Module):
    """In place of an end of the model that another stage has: its first argument."""

    weight = None

    def forward(self, hidden: Tensor, *_rest: Any) -> Tensor:
        return hidden


class CarriedSum(nn.Module):
    """The layer_sum seam where other layers are in other stages: their sums come along with the hidden states."""

    def __init__(self, layer_sum: nn.Module) -> None:
        super().__init__()
        self.layer_sum = layer_sum
        self.carried: tuple[Tensor, ...] = ()
        """From the stages before this one; after forward, with this one's."""

    def forward(self, stats: Sequence[RouterStats]) -> RouterStats:
        """What routers did in this stage and in those before it."""
        here: RouterStats = self.layer_sum(stats)
        self.carried = tuple(a + b for a, b in zip(self.carried, here, strict=True)) if self.carried else here
        return RouterStats(*self.carried)


class RepeatableLoss(nn.Module):
    """The loss seam with gradients that may be asked for twice: for hidden states now, for the weight later."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """As the loss it wraps."""
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        total = self.loss(*leaves, labels)
        known: Tensor = _Known.apply(hidden, weight, total.detach(), *torch.autograd.grad(total, leaves))  # type: ignore[no-untyped-call]
        return known


class _Known(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, _a: Tensor, _b: Tensor, value: Tensor, da: Tensor, db: Tensor) -> Tensor:
        ctx.save_for_backward(da, db)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        da, db = ctx.saved_tensors
        return da * grad.to(da.dtype), db * grad.to(db.dtype), None, None, None
