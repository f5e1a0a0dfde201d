"""One rank of a run, `python -m zoo.core.worker FOLDER`, started by the launcher; other programs serve alike."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from zoo.core.finished import resume_after_restart
from zoo.core.job import Job
from zoo.core.launch import Office
from zoo.core.plugins import Plugins
from zoo.core.train import train
from zoo.core.watchdog import WatchedHeart


def answer(work: Callable[[dict[str, Any], Office], object], folder: Path) -> int:
    """Do as this rank what a launcher's folder asks for; returns the status to end with.

    An error is left where the launcher finds it.
    """
    office, rank = Office(folder), int(os.environ["RANK"])
    office.check_in(rank)
    try:
        work(json.loads(office.payload.read_text()), office)
    except BaseException as error:
        office.report(rank, error)
        return 1
    return 0


def serve(work: Callable[[dict[str, Any], Office], object]) -> NoReturn:
    """`answer` the folder named on the command line, and end."""
    status = answer(work, Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the interpreter's own way out: it waits for peers that are gone, and threads that still run abort it.
    os._exit(status)


def train_as_asked(payload: dict[str, Any], office: Office) -> None:
    """The work of a training run: the job and the plugins that the launcher resolved."""
    with WatchedHeart(office.root, int(os.environ["RANK"])) as heart:
        job = Job.from_plain(payload["job"])
        if payload["restart"] and job.checkpoint.out is not None:
            resume = resume_after_restart(Path(job.checkpoint.out), job.checkpoint.resume)
            job = job.replace("checkpoint", resume=resume)
        train(job, Plugins.from_resolved(payload["plugins"]), heart)


if __name__ == "__main__":
    serve(train_as_asked)
