"""Work of one rank, and values of all, shared by the ranks: objects over the host's process group, all collective."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from zoo.core.errors import DataError, ZooError, error_of, one_line

Answer = TypeVar("Answer")


def shared(work: Callable[[], Answer], *, named: AbstractContextManager[object] | None = None) -> Answer:
    """Return what `work` returns on this rank. If it fails on any, raise the error of the first such rank on all.

    `work` has no collectives in it. The rank that failed raises its own error, the others what can be sent of it.
    `named` is what `work` runs in, to give its errors the names of plugins before they are sent.
    """
    answer: Answer | None = None
    own: Exception | None = None
    said: tuple[str, int, str, str] | None = None
    try:
        with named or nullcontext():
            answer = work()
    except ZooError as error:
        own, said = error, (type(error).__name__, error.exit_code, str(error), host_name())
    except Exception as error:  # a fault, which must not leave the others waiting
        own, said = error, (ZooError.__name__, ZooError.exit_code, one_line(error), host_name())
    everyone = gathered(said)
    failed = [rank for rank, words in enumerate(everyone) if words is not None]
    if not failed:
        return answer  # type: ignore[return-value]  # this rank did not fail
    if own is not None and not isinstance(own, ZooError):
        raise own
    first = failed[0]
    kind, exit_code, message, host = everyone[first]
    where = "" if len(failed) == len(everyone) else f"rank {first} (host {host}): "
    raise error_of(kind, exit_code, where + message) from own


def gathered(value: Any) -> list[Any]:
    """Return the value of every rank, in their order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def on_rank_zero(action: Callable[[], Answer], group: dist.ProcessGroup | None = None) -> Answer:
    """Return on every rank what an action on rank 0 returns. Raise everywhere what it raised, OSError as DataError."""
    holder: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            holder[0] = action()
        except ZooError as error:
            holder[1] = error
        except OSError as error:
            said = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
            holder[1] = DataError(said)
    dist.broadcast_object_list(holder, src=0, group=group)
    if holder[1] is not None:
        raise holder[1]
    answer: Answer = holder[0]
    return answer


def gathered_on_rank_zero(mine: Answer, group: dist.ProcessGroup | None = None) -> list[Answer]:
    """Return what all ranks give, on rank 0; nothing elsewhere."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=group)
    return everyone or []


def host_name() -> str:
    """Return the name of this host, as it calls itself."""
    return socket.gethostname()
