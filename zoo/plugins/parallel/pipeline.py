"""The `pipeline` adapter: blocks are dealt out over the axis `pp`, and torch's schedules order the microbatches.

Only hidden states travel. Masks, positions and labels are on every rank of `pp` already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from zoo.core.contracts import LayoutRequest, ParallelPlan, Phase, Setup
from zoo.core.errors import UsageError
from zoo.core.forward_backward import Counts, Sums, as_losses
from zoo.core.seams import find
from zoo.plugins.parallel.stages import SCHEDULES, balance, objection, stages_of, virtual

if TYPE_CHECKING:
    from zoo.core.batch import Batch
    from zoo.core.mesh import Mesh

_ONE_STAGE: Mapping[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_STAGES: Mapping[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class PipelineParallel:
    """Pipeline parallelism for any model whose plan names its blocks and what its first and last stage need."""

    name: ClassVar[str] = "pipeline"
    axes: ClassVar[tuple[str, ...]] = ("pp",)
    phase: ClassVar[Phase] = Phase.SPLIT

    def __init__(self) -> None:
        self._cut: Cut | None = None

    def check(self, request: LayoutRequest) -> str | None:
        """None, or why these blocks cannot be dealt out so."""
        return objection(request)

    def applies(self, degrees: Mapping[str, int], setup: Setup) -> bool:
        """With more than one rank on `pp`."""
        return degrees["pp"] > 1

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> nn.Module:
        """Keep the blocks and ends of this rank's stages; names stay. Raises UsageError if a seam is left without."""
        self._cut = cut = Cut.of(model, plan, mesh, setup)
        held = {name for stage in cut.mine for name in cut.blocks[stage]}
        for name in (name for stage in cut.blocks for name in stage if name not in held):
            delattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for stage, ends in ((0, cut.first), (cut.num_stages - 1, cut.last)):
            for name in ends if stage not in cut.mine else ():
                if not (cut.holds_end and any(p.startswith(f"{name}.") for p in cut.tied)):
                    _leave_out(model, name)
        for seam, glob in plan.seams.items():
            try:
                find(model, glob)
            except UsageError:
                raise UsageError(f"--pp leaves a rank without any '{seam}' in its blocks; lower --pp") from None
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, setup: Setup) -> Batch:
        """Unchanged: every rank of `pp` works on the same rows."""
        return batch

    def forward_backward(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> Pipelined:
        """The schedule over the stages that `apply` kept."""
        assert self._cut is not None, "apply comes first"
        return Pipelined(model, self._cut, mesh, setup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a model is cut, as names of modules."""

    blocks: list[list[str]]
    """Of each stage."""
    mine: list[int]
    """Stages of this rank."""
    first: list[str]
    last: list[str]
    """What only the first and the last stage need."""
    loss: list[str]
    row_sum: list[str]
    """Names of these seams."""
    tied: frozenset[str]
    """Parameters that both of them have."""
    classes: Mapping[str, type[nn.Module]]
    """Of the modules that hold blocks or ends."""
    hidden_size: int

    @classmethod
    def of(cls, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> Cut:
        """For a whole model on meta."""
        names, pp, pipeline = find(model, plan.block), mesh.size("pp"), setup.pipeline
        first, last = ([n for glob in globs for n in find(model, glob)] for globs in (plan.first, plan.last))
        costs = _costs(model, names, plan, pipeline.scores)
        # A look-up multiplies nothing.
        head = sum(_matrix_values(model.get_submodule(name)) for name in last)
        parts = balance(costs, pp * virtual(pipeline), last=float(head))
        ends = [{id(p) for name in end for p in model.get_submodule(name).parameters()} for end in (first, last)]
        holders = {name[:i] for name in (*names, *first, *last) for i, c in enumerate(name) if c == "."}
        return cls(
            blocks=[[names[i] for i in part] for part in parts],
            mine=stages_of(mesh.rank("pp"), pp, pipeline),
            first=first,
            last=last,
            loss=find(model, plan.seams["loss"]),
            row_sum=find(model, plan.seams["row_sum"]) if "row_sum" in plan.seams else [],
            tied=frozenset(name for name, p in model.named_parameters() if id(p) in ends[0] & ends[1]),
            classes={name: type(model.get_submodule(name)) for name in ("", *holders)},
            hidden_size=next(p.shape[-1] for name in first for p in model.get_submodule(name).parameters()),
        )

    @property
    def num_stages(self) -> int:
        return len(self.blocks)

    @property
    def holds_end(self) -> bool:
        """Whether the first or the last stage is here."""
        return not {0, self.num_stages - 1}.isdisjoint(self.mine)


class Pipelined:
    """All microbatches of a step through the stages of this rank."""

    def __init__(self, model: nn.Module, cut: Cut, mesh: Mesh, setup: Setup) -> None:
        self.cut = cut
        self.group = mesh["pp"].get_group()
        self.ranks = mesh.size("pp")
        self.device = torch.device(mesh.device_type)
        self.schedule_name = setup.pipeline.schedule
        self.dtype = getattr(torch, setup.dtype)
        self.splits = SCHEDULES[self.schedule_name].splits
        self.stages = [StageModel(stage_view(model, cut, stage, self.splits), cut, stage) for stage in cut.mine]
        self._made: tuple[tuple[int, torch.Size], Any] | None = None

    def run(self, model: nn.Module, batches: Sequence[Batch], counts: Counts) -> Sums:
        """As `ForwardBackward.run`; every rank of `pp` calls it with the same batches."""
        sums = Sums()
        for stage in self.stages:
            stage.begin(batches, counts, sums)
        index = torch.arange(len(batches))
        # The first stage has an input because torch wants one; every stage looks its batch up by number.
        inputs = (index,) if 0 in self.cut.mine else ()
        schedule = self._schedule(batches)
        with _gathered(model) if self.splits else nullcontext():
            schedule.step(*inputs, number=index, target=index, return_outputs=False)
        self._add_tied(model)
        return sums

    def repeated(self) -> Collection[str]:
        """The tied parameters of a last stage: the first counts them."""
        return self.cut.tied if self._has_last_only else ()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm over all stages."""
        total = norm.square()
        dist.all_reduce(total, group=self.group)
        return total.sqrt()

    @property
    def _has_last_only(self) -> bool:
        return self.cut.num_stages - 1 in self.cut.mine and 0 not in self.cut.mine

    def _schedule(self, batches: Sequence[Batch]) -> Any:
        """torch's schedule for so many microbatches of this shape, made when either is new."""
        shapes = {batch.tokens.shape for batch in batches}
        if len(shapes) > 1:
            raise UsageError(f"--pp needs microbatches of one shape and this step has {sorted(map(tuple, shapes))}")
        key = (len(batches), shapes.pop())
        if self._made is None or self._made[0] != key:
            self._made = (key, self._make(*key))
        return self._made[1]

    def _make(self, microbatches: int, shape: torch.Size) -> Any:
        stages = [self._stage(stage, shape) for stage in self.stages]
        options = {"n_microbatches": microbatches, "loss_fn": _as_it_is, "scale_grads": False}
        if self.schedule_name in _ONE_STAGE:
            return _ONE_STAGE[self.schedule_name](stages[0], **options)
        return _STAGES[self.schedule_name](stages, **options)

    def _stage(self, stage: StageModel, shape: torch.Size) -> PipelineStage:
        """What a stage takes and gives is told, for torch would otherwise run it once to see."""
        hidden = torch.empty(*shape, self.cut.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.promote_types(self.dtype, torch.float32), device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            self.cut.num_stages,
            self.device,
            input_args=number if stage.is_first else hidden,
            output_args=loss if stage.is_last else hidden,
            group=self.group,
        )

    def _add_tied(self, model: nn.Module) -> None:
        """Both ends get the sum of their gradients of tied parameters, so that they stay equal bit for bit."""
        here = [stage in self.cut.mine for stage in (0, self.cut.num_stages - 1)]
        if sum(here) != 1:
            return
        other = self.ranks - 1 if here[0] else 0
        for name in sorted(self.cut.tied):
            gradient = model.get_parameter(name).grad
            assert gradient is not None, "both ends have a gradient"
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            theirs = torch.empty_like(local)
            peer = dist.get_global_rank(self.group, other)
            exchange = [dist.P2POp(dist.isend, local.contiguous(), peer, self.group)]
            exchange.append(dist.P2POp(dist.irecv, theirs, peer, self.group))
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            local += theirs


class StageModel(nn.Module):
    """One stage: microbatch by number and hidden states to hidden states, or to a part of the loss."""

    def __init__(self, view: nn.Module, cut: Cut, index: int) -> None:
        super().__init__()
        self.view = view
        self.index = index
        self.is_first, self.is_last = index == 0, index == cut.num_stages - 1
        self._step: tuple[Sequence[Batch], Counts, Sums] | None = None

    def begin(self, batches: Sequence[Batch], counts: Counts, sums: Sums) -> None:
        """Set what the numbers mean and where losses and reports go."""
        self._step = batches, counts, sums

    def forward(self, hidden: Tensor, number: Tensor) -> Tensor:
        """hidden `[B, T, D]`, or anything on the first stage, and a number `[1]` on the host."""
        assert self._step is not None, "begin comes first"
        batches, counts, sums = self._step
        batch = batches[int(number)]
        entry = batch.tokens if self.is_first else hidden
        losses = as_losses(self.view(entry, batch.positions, batch.mask, batch.labels))
        sums.add_report(losses, counts.share(batch))
        if isinstance(losses.rows, Tensor):
            raise UsageError("--pp: this model has a loss over rows, which needs all of its blocks on one rank")
        if not self.is_last:
            return losses.tokens
        loss = counts.loss(losses, batch)
        sums.add_loss(loss)
        return loss


def stage_view(model: nn.Module, cut: Cut, stage: int, splits: bool) -> nn.Module:
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
    for name in cut.row_sum:
        share = len(cut.blocks[stage]) / sum(map(len, cut.blocks))
        view.set_submodule(name, WholeRowSum(view.get_submodule(name), share))
    return view


class PassThrough(nn.Module):
    """In place of an end of the model that another stage has: its first argument."""

    weight = None

    def forward(self, hidden: Tensor, *_rest: Any) -> Tensor:
        return hidden


class WholeRowSum(nn.Module):
    """The row_sum seam where this stage's blocks are a share of all: every block counts alike, so do those elsewhere.

    Right for the sum of the counts only, which is all there is to ask where no loss is trained on them.
    """

    def __init__(self, row_sum: nn.Module, share: float) -> None:
        super().__init__()
        self.row_sum = row_sum
        self.share = share

    def forward(self, counts: Tensor) -> Tensor:
        """Counts of this rank to those of the row in all blocks."""
        whole: Tensor = self.row_sum(counts).double() / self.share
        return whole


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


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """FSDP2 gathers weights once and sums gradients at the end: it acts when inputs' gradients are there, too soon."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    _sum_gradients(model, False)
    yield
    _sum_gradients(model, True)
    # What autograd would call after a last backward, as torch's own stages do it.
    fully_shard.state(model)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def _sum_gradients(model: FSDPModule, now: bool) -> None:
    model.set_is_last_backward(now)
    model.set_reshard_after_backward(now)
    model.set_requires_gradient_sync(now)


def _as_it_is(loss: Tensor, _target: Tensor) -> Tensor:
    return loss


def _leave_out(model: nn.Module, name: str) -> None:
    """Without its parameters; what has none stays, for it may be a seam."""
    if any(True for _ in model.get_submodule(name).parameters()):
        model.set_submodule(name, PassThrough())


def _matrix_values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _costs(model: nn.Module, blocks: Sequence[str], plan: ParallelPlan, scores: Sequence[float]) -> list[float]:
    """Of each block, multiplications of a token: values of matrices, and scores where it has attention."""
    attending = [name for name in find(model, plan.seams["attention"])]
    of_layer = dict(zip(attending, scores, strict=True)) if scores else {}
    return [
        _matrix_values(model.get_submodule(block))
        + sum(cost for name, cost in of_layer.items() if name.startswith(f"{block}."))
        for block in blocks
    ]
