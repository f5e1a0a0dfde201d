"""K/V rows as one buffer that ranks can send, and the grouped messages that send it.

A buffer is `[rows, 2, B, G, H]`: K and V of a row side by side, so any range of rows is one contiguous message.
Shape letters: B rows of the batch, G key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.core.contracts.attention import Link
from zoo.core.sequence.ranges import Range, Ranges, count


def row_bytes(k: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes on the wire of one K/V row of k `[B, G, S, H]`, in k's dtype unless another is named."""
    return 2 * k.shape[0] * k.shape[1] * k.shape[3] * (dtype or k.dtype).itemsize


def empty_rows(rows: int, k: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised buffer of K/V rows like k `[B, G, S, H]`."""
    batch, heads, _, size = k.shape
    return torch.empty((rows, 2, batch, heads, size), dtype=dtype or k.dtype, device=k.device)


def pack(k: Tensor, v: Tensor, rows: Ranges, out: Tensor) -> Tensor:
    """Copy local rows of k and v `[B, G, S, H]` into a buffer of as many rows, and return it."""
    at = 0
    for start, stop in rows:
        for kv, tensor in enumerate((k, v)):
            out[at : at + stop - start, kv].copy_(tensor[:, :, start:stop].permute(2, 0, 1, 3))
        at += stop - start
    return out


def heads(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a buffer as `[B, G, rows, H]`, without a copy."""
    return buffer[:, 0].permute(1, 2, 0, 3), buffer[:, 1].permute(1, 2, 0, 3)


def add_rows(dk: Tensor, dv: Tensor, rows: Ranges, buffer: Tensor) -> None:
    """Add a buffer's rows to these rows of dk and dv `[B, G, S, H]`, in place."""
    more_k, more_v = heads(buffer)
    at = 0
    for start, stop in rows:
        dk[:, :, start:stop].add_(more_k[:, :, at : at + stop - start])
        dv[:, :, start:stop].add_(more_v[:, :, at : at + stop - start])
        at += stop - start


@dataclass(frozen=True, slots=True)
class Message:
    """Rows of a buffer that go to, or come from, one rank of the group."""

    peer: int
    rows: Range


def rows_in(messages: Iterable[Message]) -> int:
    """Rows that messages carry."""
    return count(message.rows for message in messages)


class Transfer:
    """Messages on their way. The buffers must be left alone until `wait` returns."""

    def __init__(self, works: Iterable[dist.Work] = ()) -> None:
        self._works = list(works)

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()


def post(
    link: Link,
    source: Tensor,
    sends: Sequence[Message],
    target: Tensor,
    receives: Sequence[Message],
    *,
    tag: int = 0,
) -> Transfer:
    """Start sending rows of `source` and receiving rows of `target`, as one group of messages.

    Messages between two ranks match in order, so both sides must list them in the same order with the same sizes.
    Nothing at all is called if there are no messages. `tag` keeps transfers in flight at the same time apart.
    """
    return exchange(
        link,
        [(message.peer, source[message.rows[0] : message.rows[1]]) for message in sends],
        [(message.peer, target[message.rows[0] : message.rows[1]]) for message in receives],
        tag=tag,
    )


def exchange(
    link: Link, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], *, tag: int = 0
) -> Transfer:
    """As `post`, for contiguous tensors `(peer, tensor)`."""
    operations = [
        dist.P2POp(call, tensor, group=link.group, tag=tag, group_peer=peer)
        for call, messages in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in messages
    ]
    return Transfer(dist.batch_isend_irecv(operations)) if operations else Transfer()
