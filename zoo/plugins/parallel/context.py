"""The `context` adapter: rows of tokens are cut over the axis `cp`, and the attention seam learns to exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.batch import Batch
from zoo.core.contracts import ContextScheme, LayoutRequest, ParallelPlan, Phase, Setup
from zoo.core.errors import UsageError
from zoo.core.mesh import Mesh
from zoo.core.seams import swap


class ContextParallel:
    """Context parallelism for any model with an `attention` seam, by any scheme, with any backend."""

    name = "context"
    axes = ("cp",)
    phase = Phase.EXCHANGE

    def check(self, request: LayoutRequest) -> str | None:
        """None, or the scheme's reason why this length cannot be cut so."""
        degree = request.degrees.get("cp", 1)
        if degree == 1:
            return None
        if request.scheme is None:
            return f"--cp {degree} needs a context scheme and none was chosen; type --cp-scheme ring"
        return request.scheme.check(request.problem, request.seq, degree)

    def applies(self, degrees: Mapping[str, int], setup: Setup) -> bool:
        """With more than one rank on `cp`."""
        return degrees["cp"] > 1

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> nn.Module:
        """Give every attention seam the scheme and the group. Raises UsageError if the model has no such seam."""
        if "attention" not in plan.seams:
            raise UsageError(f"--cp needs an attention seam and {type(model).__name__}'s plan names none; use --cp 1")
        group = mesh["cp"].get_group()
        _connect(group, mesh.device_type)
        exchange = Exchange(scheme=_scheme(setup), group=group)
        swap(model, plan.seams["attention"], lambda old: _exchanging(old, exchange), owner=self.name)
        return model

    def shard_batch(self, batch: Batch, mesh: Mesh, setup: Setup) -> Batch:
        """This rank's tokens, labels and positions, and its view of the mask. Host only."""
        cp = mesh["cp"]
        rank = cp.get_local_rank()
        layout = _scheme(setup).layout(batch.tokens.shape[1], cp.size())
        return replace(
            batch,
            tokens=layout.take(batch.tokens, rank, 1),
            labels=layout.take(batch.labels, rank, 1),
            positions=layout.take(batch.positions, rank, 1),
            mask=ShardedMask(batch.mask, layout, rank),
        )


def _scheme(setup: Setup) -> ContextScheme:
    if setup.scheme is None:
        raise UsageError("--cp needs a context scheme and none was chosen; type --cp-scheme ring")
    return setup.scheme


def _exchanging(old: nn.Module, exchange: Exchange) -> AttentionSeam:
    if not isinstance(old, AttentionSeam):
        raise UsageError(
            f"--cp found {type(old).__name__} in the attention seam, where core puts an AttentionSeam: "
            f"another plugin replaced it; block that plugin with --no-plugin NAME"
        )
    return AttentionSeam(old.backend, exchange)


def _connect(group: dist.ProcessGroup, device_type: str) -> None:
    """NCCL connects a group in its first call, in which all ranks must take part; a ring's hop may leave some out."""
    if device_type != "cpu":
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
