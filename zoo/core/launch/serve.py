"""What every rank of a launcher does: take the work from the launcher's folder, do it, leave an error or an answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from zoo.core.launch.rank_folder import Office
from zoo.core.launch.watchdog import Heart
from zoo.core.machine.launcher_env import own_rank


def answer(work: Callable[[dict[str, Any], Office, Heart], object], folder: Path, heart: Heart) -> int:
    """Do as this rank what a launcher's folder asks for; returns the status to end with.

    An error is left where the launcher finds it.
    """
    office, rank = Office(folder), own_rank()
    try:
        with heart:
            work(json.loads(office.payload.read_text()), office, heart)
    except BaseException as error:
        office.report(rank, error)
        return 1
    return 0


def serve(work: Callable[[dict[str, Any], Office, Heart], object], folder: Path, heart: Heart) -> NoReturn:
    """`answer` a launcher's folder, and end the process."""
    status = answer(work, folder, heart)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the interpreter's own way out: it waits for peers that are gone, and threads that still run abort it.
    os._exit(status)
