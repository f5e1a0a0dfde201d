"""What a rank of zoo's launcher does first: be seen by the watchdog, and hear signals, before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.core.errors import SavedOnSignal
from zoo.core.launch.lasting_output import outlive_readers
from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.signals import hear_from_the_start
from zoo.core.launch.watchdog import WatchedHeartbeat
from zoo.core.machine.launcher_env import own_rank


def begin(folder: Path) -> WatchedHeartbeat:
    """Say that this rank is there; from now on a signal ends it until its first step begins."""
    rank_folder, rank = RankFolder(folder), own_rank()
    heartbeat = WatchedHeartbeat(folder, rank)
    outlive_readers()
    hear_from_the_start(lambda _number: os._exit(SavedOnSignal.exit_code))
    rank_folder.check_in(rank)
    if rank_folder.stopping.exists():  # asked before this rank could be told
        os._exit(SavedOnSignal.exit_code)
    return heartbeat
