"""One rank of a run: `python -m zoo.core.worker FOLDER`, started by the launcher."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from zoo.core.job import Job
from zoo.core.launch import Office
from zoo.core.plugins import Plugins
from zoo.core.train import train


def main(folder: str) -> int:
    """Train, and leave any error where the launcher finds it."""
    office, rank = Office(Path(folder)), int(os.environ["RANK"])
    office.check_in(rank)
    try:
        payload = json.loads(office.payload.read_text())
        train(Job.from_plain(payload["job"]), Plugins.from_resolved(payload["plugins"]))
    except BaseException as error:
        office.report(rank, error)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the interpreter's own way out: it waits for peers that are gone, and threads that still run abort it.
    os._exit(status)
