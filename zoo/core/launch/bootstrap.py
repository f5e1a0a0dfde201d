"""The first lines of every rank: give it the imports of the command that started it.

    python FLAGS -P zoo/core/launch/bootstrap.py PACKAGE.MODULE:FUNCTION FOLDER

Python runs this file by its path and imports nothing of zoo before `sys.path` is the command's. Otherwise a rank could
find another zoo, or a `random.py` of the working directory in the place of the standard library's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

PATH_FILE = "path.json"
"""In the launcher's folder: `sys.path` of the command, as JSON."""


def start_file(folder: Path, rank: int) -> Path:
    """Return where a rank leaves what it writes to stderr while it imports."""
    return folder / f"{rank}.start"


def main() -> None:
    """Import what this rank is to run, then run it. What cannot be imported ends the process with its traceback.

    Until all is imported, stderr goes to a file, so that the launcher can quote a rank that died too early to say why.
    """
    target, folder = sys.argv[1], Path(sys.argv[2])
    sys.path[:] = json.loads((folder / PATH_FILE).read_text())
    said = start_file(folder, int(os.environ["RANK"]))
    stderr = os.dup(2)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    heartbeat = importlib.import_module("zoo.core.launch.rank_start").begin(folder)
    serve = importlib.import_module("zoo.core.launch.serve").serve
    module, _, name = target.partition(":")
    work = getattr(importlib.import_module(module), name)
    sys.stderr.flush()
    os.dup2(stderr, 2)
    os.close(stderr)
    sys.stderr.write(said.read_text(errors="replace"))
    said.unlink()  # no last words any more
    serve(work, folder, heartbeat)


if __name__ == "__main__":
    main()
