"""What every rank of a launcher does: take the work from the launcher's folder, do it, leave an error or an answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.watchdog import Heartbeat
from zoo.core.machine.launcher_env import own_rank


def answer(work: Callable[[dict[str, Any], RankFolder, Heartbeat], object], folder: Path, heartbeat: Heartbeat) -> int:
    """Do as this rank what a launcher's folder asks for; returns the status to end with.

    An error is left where the launcher finds it.
    """
    rank_folder, rank = RankFolder(folder), own_rank()
    try:
        with heartbeat:
            work(json.loads(rank_folder.payload.read_text()), rank_folder, heartbeat)
    except BaseException as error:
        rank_folder.report(rank, error)
        return 1
    return 0


def serve(
    work: Callable[[dict[str, Any], RankFolder, Heartbeat], object], folder: Path, heartbeat: Heartbeat
) -> NoReturn:
    """`answer` a launcher's folder, and end the process."""
    status = answer(work, folder, heartbeat)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the interpreter's own way out: it waits for peers that are gone, and threads that still run abort it.
    os._exit(status)
