"""From rows on the host to this rank's microbatches: one reader a group of peers, everybody the same global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zoo.core.contracts.batch import Batch, Row
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.parallel import ParallelAdapter
from zoo.core.data.collate import collate, row_mask
from zoo.core.errors import ZooError
from zoo.core.mesh.degrees import PEER_AXES
from zoo.core.mesh.mesh import Mesh
from zoo.core.registry.answers import check_batch

if TYPE_CHECKING:
    from zoo.core.data.packing import Stats
    from zoo.core.data.rows import RowStream


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """What one step trains on."""

    batches: list[Batch]
    """This rank's microbatches."""
    trained_tokens: int
    """Of the whole global batch."""
    document_tokens: int
    """Of the whole global batch, those that are no padding."""
    mean_visible_keys: float
    """Keys that a token of the global batch sees on average over layers, for counting FLOPs."""
    position: Position
    """How far the data was read for this step and all before it."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream of rows stood, and what had become of its samples. Empty on ranks that do not read."""

    cursor: Mapping[str, Any] | None = None
    stats: Stats | None = None
    fill: float = 0.0

    @classmethod
    def of(cls, stream: RowStream | None) -> Position:
        return cls(stream.state_dict(), stream.stats, stream.fill) if stream is not None else cls()


class Feed:
    """Microbatches of a step. The rows depend on the stream and the global batch only, never on the layout.

    The first rank of each group of peers (ranks that work on the same rows) reads the stream and broadcasts what
    its group needs, so tokenizing costs once a data-parallel rank. An error while reading reaches every rank.
    Rows, layout and plans of the next step are made on a thread of their own while this step computes.
    """

    def __init__(
        self,
        stream: RowStream | None,
        *,
        mesh: Mesh,
        layout: Layout,
        adapters: Sequence[ParallelAdapter],
        steps: int,
        mask: str = "causal",
    ) -> None:
        self.stream = stream
        self.mesh = mesh
        self.adapters = adapters
        self.layout = layout
        self.mask = mask
        self.windows = layout.model.windows or {None: 1}
        self._left = steps
        self._looked = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        per_rank = layout.microbatches * layout.micro_batch
        first = (mesh.rank("dp_replicate") * layout.degrees.dp_shard + mesh.rank("dp_shard")) * per_rank
        self.mine = slice(first, first + per_rank)
        # Last, for the thread sets out at once.
        self._next = self._submit()

    def ahead(self) -> Position | None:
        """How far the data is read for the next step; None if there is none. Raises what reading it raised."""
        return self._next.result().position if self._next is not None else None

    def ready(self) -> None:
        """Wait until the next step's data is there, or the error met while reading it."""
        if self._next is not None:
            self._next.exception()

    def step(self, device: torch.device) -> StepData:
        """The next step's data, at most `steps` times. Raises, on every rank, what reading it raised."""
        assert self._next is not None, "a feed gives as many steps as it was made for"
        data = self._next.result()
        self._next = self._submit()
        return replace(data, batches=[batch.to(device) for batch in data.batches])

    def close(self) -> None:
        """Start nothing more. What is being read is not waited for: it may wait for ranks that are gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Start nothing more, and wait for what every rank is reading now; their process groups are quiet then."""
        self.ready()
        self.close()

    def _submit(self) -> Future[StepData] | None:
        self._left -= 1
        return self._thread.submit(self._make) if self._left >= 0 else None

    def _make(self) -> StepData:
        """Everything on the host that a step needs."""
        message = self._share(self._read())
        if isinstance(message, ZooError):
            raise message
        rows, trained_tokens, document_tokens, mean_visible_keys = message
        size = self.layout.micro_batch
        microbatches = [rows[i : i + size] for i in range(0, len(rows), size)]
        return StepData(
            batches=[self._batch(part) for part in microbatches],
            trained_tokens=trained_tokens,
            document_tokens=document_tokens,
            mean_visible_keys=mean_visible_keys,
            position=Position.of(self.stream),
        )

    def _read(self) -> Any:
        """Rows of this data-parallel rank and three facts on all, or the error met; None on ranks that do not read."""
        if self.stream is None:
            return None
        try:
            rows = self.stream.take(self.layout.global_batch)
        except ZooError as error:
            return error
        seen = sum(self._visible(row) for row in rows)
        tokens = sum(len(row.tokens) for row in rows)
        trained, real = sum(row.trained_tokens for row in rows), sum(row.document_tokens for row in rows)
        return rows[self.mine], trained, real, seen / tokens

    def _visible(self, row: Row) -> float:
        """Pairs (query, key) that a layer sees in a row, in the mean over layers."""
        mask = row_mask(len(row.tokens), row.documents, row.labels, self.mask)
        areas = sum(mask.with_window(window).area * layers for window, layers in self.windows.items())
        return areas / sum(self.windows.values())

    def _batch(self, rows: Sequence[Row]) -> Batch:
        batch = collate(rows, mask=self.mask)
        for adapter in self.adapters:
            before, batch = batch, adapter.shard_batch(batch, self.mesh, self.layout)
            if not self._looked:
                check_batch(adapter, before, batch)
        self._looked = True
        return batch

    def _share(self, message: Any) -> Any:
        """Hand the first peer's message to all, one axis after the other, outermost first."""
        for position, axis in enumerate(PEER_AXES):
            inner = PEER_AXES[position + 1 :]
            if self.mesh.size(axis) > 1 and all(self.mesh.rank(a) == 0 for a in inner):
                holder = [message]
                group = self.mesh.host_group(axis)
                dist.broadcast_object_list(holder, group=group, group_src=0, device=torch.device("cpu"))
                message = holder[0]
        return message


def reads_data(mesh: Mesh) -> bool:
    """Whether this rank is the one of its peers that opens the data."""
    return all(mesh.rank(axis) == 0 for axis in PEER_AXES)
