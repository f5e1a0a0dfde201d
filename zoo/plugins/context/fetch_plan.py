"""The plan of schemes that fetch: the rows a rank needs of each other one, straight from their owner. Host only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from zoo import HeadShape, Mask, SequenceLayout, Stage, local_slices, remote_needs, remote_slices
from zoo.core.attention.needs import rows_needed
from zoo.core.attention.slices import Slices, Step
from zoo.core.attention.wire import Message, rows_in
from zoo.core.sequence.ranges import Range, Ranges, RowIndex, count, union


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What one rank does for one batch, in every layer of one shape."""

    heads: HeadShape
    groups: tuple[Range, ...]
    """Key/value heads that are fetched together, in order."""
    own: Slices
    """This rank's queries and keys, computed while the others travel."""
    step: Step
    """This rank's queries and the fetched keys, which lie in order of position."""
    keys: int
    """Number of fetched rows."""
    packed: Ranges
    """Local rows that some rank fetches."""
    sends: tuple[Message, ...]
    """Rows of the packed buffer, by rank that fetches them."""
    receives: tuple[Message, ...]
    """Rows of the buffer of fetched keys, by rank they come from."""
    returned: tuple[Message, ...]
    """Backward: rows of the buffer in which the gradients of `sends` come back, one after another."""
    home: tuple[Range, ...]
    """Local rows that each of `returned` belongs to."""

    @property
    def slices(self) -> Slices:
        """Every slice, those of the second step relative to it."""
        return self.own + self.step.slices

    @property
    def sent_rows(self) -> int:
        """K/V rows this rank sends forward, and again backward."""
        return rows_in(self.sends)

    @property
    def sent_gradient_rows(self) -> int:
        """dK/dV rows this rank sends backward."""
        return rows_in(self.receives)

    def stages(self, value_bytes: int, gradient_bytes: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Own keys are computed with while the first heads travel, and each group of heads while the next one does."""
        ahead, back = (self._stages(value_bytes, gradients) for gradients in (0, gradient_bytes))
        return ahead, back

    def _stages(self, value_bytes: int, gradient_bytes: int) -> tuple[Stage, ...]:
        sizes = [stop - start for start, stop in self.groups]
        repeats, row = self.heads.num_heads // self.heads.num_kv_heads, 2 * self.heads.head_dim
        scores = [self.heads.num_heads * sum(s.area for s in self.own)]
        scores += [repeats * size * self.step.area for size in sizes] + [0]
        keys = [value_bytes * row * size * self.sent_rows for size in sizes] + [0, 0]
        sums = [0, 0] + [gradient_bytes * row * size * self.sent_gradient_rows for size in sizes]
        return tuple(Stage(key + total, area) for key, total, area in zip(keys, sums, scores, strict=True))


def fetch_plan(mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape, *, num_groups: int = 1) -> FetchPlan:
    """The plan of one rank. Messages between two ranks are in order of position on both sides.

    The key/value heads are fetched in so many groups, one after another; all ranks must say the same number.
    """
    num_groups = min(num_groups, heads.num_kv_heads)
    edges = [heads.num_kv_heads * i // num_groups for i in range(num_groups + 1)]
    needs, chunks = remote_needs(mask, layout), layout.chunks[rank]
    others = [other for other in range(layout.degree) if other != rank]
    given = [(other, part) for other in others for part in rows_needed(needs, rank, other)]
    fetched = [(other, part) for other in others for part in rows_needed(needs, other, rank)]
    keys, packed = union(part for _, part in fetched), union(part for _, part in given)
    sends, own = _messages(given, packed), RowIndex(chunks)
    return FetchPlan(
        heads=heads,
        groups=tuple(pairwise(edges)),
        own=local_slices(mask, chunks),
        step=Step.around(remote_slices(mask, chunks, keys)),
        keys=count(keys),
        packed=own.locate(packed),
        sends=sends,
        receives=_messages(fetched, keys),
        returned=_end_to_end(sends),
        home=tuple((own.before(start), own.before(stop - 1) + 1) for _, (start, stop) in given),
    )


def _messages(parts: Sequence[tuple[int, Range]], buffer: Ranges) -> tuple[Message, ...]:
    """One message for each range of positions, in rows of a buffer that holds `buffer`."""
    index = RowIndex(buffer)
    starts = [index.before(part[0]) for _, part in parts]
    return tuple(Message(peer, (at, at + b - a)) for at, (peer, (a, b)) in zip(starts, parts, strict=True))


def _end_to_end(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same messages in a buffer where each has its own place."""
    ends = list(accumulate((rows_in([message]) for message in messages), initial=0))
    return tuple(Message(message.peer, rows) for message, rows in zip(messages, pairwise(ends), strict=True))
