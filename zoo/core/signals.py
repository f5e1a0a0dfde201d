"""SIGTERM, SIGINT and SIGUSR1 (a cluster's warning) as a wish to save and stop, shared by all ranks."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from zoo.core.launch import inside_launcher

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Inside `with`, a signal is noted instead of ending the process. The launcher's death is a wish to stop too."""

    def __init__(self) -> None:
        self._asked = self._by_hand = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        self._parent = os.getppid()
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def any_rank_asked(self) -> bool:
        """Whether some rank was asked to stop; collective, on the host."""
        orphaned = inside_launcher() and os.getppid() != self._parent
        flag = torch.tensor([int(self._asked or orphaned)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _note(self, number: int, _frame: FrameType | None) -> None:
        """A second SIGTERM or SIGINT aborts a run of one process; ranks of a launcher leave that to it."""
        warned = number == signal.SIGUSR1
        if self._by_hand and not warned and not inside_launcher():
            raise KeyboardInterrupt
        self._asked, self._by_hand = True, self._by_hand or not warned
