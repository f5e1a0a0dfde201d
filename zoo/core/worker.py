"""What a rank of zoo's launcher does: take the work from the launcher's folder, do it, leave an error or an answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from zoo.core.finished import resume_after_restart
from zoo.core.job import Job
from zoo.core.launcher_env import own_rank
from zoo.core.office import Office
from zoo.core.plugin_failures import plugins_named
from zoo.core.plugins import Plugins
from zoo.core.train import train
from zoo.core.watchdog import Heart


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


def train_as_asked(payload: dict[str, Any], _office: Office, heart: Heart) -> None:
    """The work of a training run: the job and the plugins that the launcher resolved."""
    job = Job.from_plain(payload["job"])
    if payload["restart"] and job.checkpoint.out is not None:
        resume = resume_after_restart(Path(job.checkpoint.out), job.checkpoint.resume)
        job = job.replace("checkpoint", resume=resume)
    plugins = Plugins.from_resolved(payload["plugins"])
    with plugins_named(plugins):
        train(job, plugins, heart)
