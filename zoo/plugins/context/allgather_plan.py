"""The all-gather's plan: the rows a rank fetches from each other one, and the two steps it computes. Host only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask
from zoo.core.attention.needs import remote_needs, rows_needed
from zoo.core.attention.ranges import Range, Ranges, RowIndex, count, union
from zoo.core.attention.slices import Slices, Step, local_slices, remote_slices
from zoo.core.attention.wire import Message, rows_in


@dataclass(frozen=True, slots=True)
class AllgatherPlan:
    """What one rank does for one batch, in every layer."""

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


def allgather_plan(mask: Mask, layout: SequenceLayout, rank: int) -> AllgatherPlan:
    """The plan of one rank. Messages between two ranks are in order of position on both sides."""
    needs, chunks = remote_needs(mask, layout), layout.chunks[rank]
    others = [other for other in range(layout.degree) if other != rank]
    given = [(other, part) for other in others for part in rows_needed(needs, rank, other)]
    fetched = [(other, part) for other in others for part in rows_needed(needs, other, rank)]
    keys, packed = union(part for _, part in fetched), union(part for _, part in given)
    sends, own = _messages(given, packed), RowIndex(chunks)
    return AllgatherPlan(
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
