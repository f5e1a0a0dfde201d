"""The `pipeline` adapter: blocks are dealt out over the axis `pp`, and torch's schedules order the microbatches.

Hidden states travel, and sums of what routers did. Masks, positions and labels are on every rank of `pp` already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from zoo import Counts, Layout, ParallelAdapter, ParallelPlan, Phase, Sums, UsageError, find_modules
from zoo.core.sequence.ranges import share_of
from zoo.plugins.parallel.pipeline.cut import Partition
from zoo.plugins.parallel.pipeline.shards import held
from zoo.plugins.parallel.pipeline.stage_model import PassThrough, StageModel, stage_view
from zoo.plugins.parallel.pipeline.stages import SCHEDULES, objection
from zoo.plugins.parallel.pipeline.traffic import account_pipeline

if TYPE_CHECKING:
    from zoo import Account, Batch, Mesh

_ONE_STAGE: Mapping[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_STAGES: Mapping[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class PipelineParallel(ParallelAdapter):
    """Pipeline parallelism for any model whose plan names its blocks and what its first and last stage need."""

    name: ClassVar[str] = "pipeline"
    axes: ClassVar[tuple[str, ...]] = ("pp",)
    phase: ClassVar[Phase] = Phase.SPLIT

    def __init__(self) -> None:
        self._cut: Partition | None = None

    def check(self, layout: Layout) -> str | None:
        """None, or why these blocks cannot be dealt out so."""
        return objection(layout)

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Keep the blocks and ends of this rank's stages; names stay. Raises UsageError if a seam is left without."""
        self._cut = cut = Partition.of(model, plan, mesh, layout)
        held = {name for stage in cut.mine for name in cut.blocks[stage]}
        for name in (name for stage in cut.blocks for name in stage if name not in held):
            delattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for stage, ends in ((0, cut.first), (cut.num_stages - 1, cut.last)):
            for name in ends if stage not in cut.mine else ():
                if not (cut.holds_end and any(p.startswith(f"{name}.") for p in cut.tied)):
                    _leave_out(model, name)
        for seam, glob in plan.seams.items():
            try:
                find_modules(model, glob)
            except UsageError:
                raise UsageError(f"--pp leaves a rank without any '{seam}' in its blocks; lower --pp") from None
        return model

    def account(self, account: Account) -> None:
        """Add what passes between stages."""
        account_pipeline(account)

    def forward_backward(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> Pipelined:
        """The schedule over the stages that `apply` kept."""
        assert self._cut is not None, "apply comes first"
        return Pipelined(model, self._cut, mesh, layout)


class Pipelined:
    """All microbatches of a step through the stages of this rank."""

    def __init__(self, model: nn.Module, cut: Partition, mesh: Mesh, layout: Layout) -> None:
        self.cut = cut
        self.group = mesh["pp"].get_group()
        self.ranks = mesh.size("pp")
        self.device = torch.device(mesh.device_type)
        self.schedule_name = layout.settings.pp_schedule
        self.dtype = getattr(torch, layout.dtype)
        self.tp = (mesh.rank("tp"), mesh.size("tp")) if layout.settings.sequence_parallel else (0, 1)
        splits = SCHEDULES[self.schedule_name].splits
        self.stages = [
            StageModel(stage_view(model, cut, stage, splits), cut, stage, layout.model.name) for stage in cut.mine
        ]
        self._held = held(model, self.stages, [cut.blocks[stage] for stage in cut.mine], layout, splits=splits)
        self._made: tuple[tuple[int, torch.Size], Any] | None = None
        if self.device.type != "cpu":
            # NCCL connects a group in its first call, in which all ranks must take part; a hop leaves some out.
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def run(self, model: nn.Module, batches: Sequence[Batch], counts: Counts) -> Sums:
        """As `ForwardBackward.run`; every rank of `pp` calls it with the same batches."""
        sums = Sums()
        for stage in self.stages:
            stage.begin(batches, counts, sums)
        index = torch.arange(len(batches))
        # The first stage has an input because torch wants one; every stage looks its batch up by number.
        inputs = (index,) if 0 in self.cut.mine else ()
        schedule = self._schedule(batches)
        with self._held():
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
        if self.tp[1] > 1:
            shape = torch.Size((shape[0], share_of(shape[1], *self.tp)))
        exact = torch.promote_types(self.dtype, torch.float32)
        passed = [torch.empty(*shape, self.cut.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)]
        if stage.sums:
            passed.append(torch.empty(self.cut.num_experts, dtype=exact, device="meta", requires_grad=True))
            passed.append(torch.empty(self.cut.num_experts, dtype=torch.int64, device="meta"))
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=exact, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            self.cut.num_stages,
            self.device,
            input_args=number if stage.is_first else tuple(passed),
            output_args=loss if stage.is_last else tuple(passed),
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


def _as_it_is(loss: Tensor, _target: Tensor) -> Tensor:
    return loss


def _leave_out(model: nn.Module, name: str) -> None:
    """Without its parameters; what has none stays, for it may be a seam."""
    if any(True for _ in model.get_submodule(name).parameters()):
        model.set_submodule(name, PassThrough())
