"""From rows on the host to this rank's microbatches: one reader a group of peers, everybody the same global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zoo.core.batch import Batch, Row, collate
from zoo.core.contracts import ParallelAdapter, Setup
from zoo.core.errors import ZooError
from zoo.core.mesh import PEER_AXES, Degrees

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.core.rows import RowStream


class Feed:
    """Microbatches of a step. The rows depend on the stream and the global batch only, never on the layout.

    The first rank of each group of peers (ranks that work on the same rows) reads the stream and broadcasts what
    its group needs, so tokenizing costs once a data-parallel rank. An error while reading reaches every rank.
    """

    def __init__(
        self,
        stream: RowStream | None,
        *,
        mesh: DeviceMesh,
        degrees: Degrees,
        adapters: Sequence[ParallelAdapter],
        setup: Setup,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        self.stream = stream
        self.mesh = mesh
        self.adapters = adapters
        self.setup = setup
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        per_rank = global_batch // degrees.dp
        first = (mesh.get_local_rank("dp_replicate") * degrees.dp_shard + mesh.get_local_rank("dp_shard")) * per_rank
        self.mine = slice(first, first + per_rank)

    def step(self, device: torch.device) -> tuple[list[Batch], int]:
        """This rank's microbatches of the next step and the global count of trained tokens."""
        message: Any = None
        if self.stream is not None:
            try:
                rows = self.stream.take(self.global_batch)
                message = (rows[self.mine], sum(row.trained_tokens for row in rows))
            except ZooError as error:
                message = error
        message = self._share(message)
        if isinstance(message, ZooError):
            raise message
        rows, trained = message
        return [
            self._batch(rows[i : i + self.micro_batch], device) for i in range(0, len(rows), self.micro_batch)
        ], trained

    def _batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        batch = collate(rows)
        for adapter in self.adapters:
            batch = adapter.shard_batch(batch, self.mesh, self.setup)
        return batch.to(device)

    def _share(self, message: Any) -> Any:
        """Hand the first peer's message to all, one axis after the other, outermost first."""
        for position, axis in enumerate(PEER_AXES):
            inner = PEER_AXES[position + 1 :]
            if self.mesh[axis].size() > 1 and all(self.mesh.get_local_rank(a) == 0 for a in inner):
                holder = [message]
                dist.broadcast_object_list(
                    holder, group=self.mesh.get_group(axis), group_src=0, device=torch.device("cpu")
                )
                message = holder[0]
        return message


def reads_data(mesh: DeviceMesh) -> bool:
    """Whether this rank is the one of its peers that opens the data."""
    return all(mesh.get_local_rank(axis) == 0 for axis in PEER_AXES)
