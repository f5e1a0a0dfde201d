"""The real `zoo` command in a process of its own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.harness.patience import PATIENCE_S
from tests.harness.warm import Command
from zoo.core.run.metrics import read_metrics


def start(*args, output=subprocess.PIPE, cold=False, **env):
    """`zoo ARGS` as a running process; output is text on stdout and stderr, pipes if no file is given for both.

    `cold` starts an interpreter, which imports everything anew and has the limits and signals of this process.
    """
    words = list(map(str, args))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | env
    if not cold and sys.platform == "linux":
        return Command(words, environment, output)
    command = [sys.executable, "-m", "zoo", *words]
    return subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment)


def zoo(*args, status=0, cold=False, **env):
    """`zoo ARGS` to its end; asserts the exit status and returns (stdout, stderr)."""
    process = start(*args, cold=cold, **env)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, f"zoo {' '.join(map(str, args))} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def train(out, *args, **env):
    """`zoo finetune ARGS --out OUT` to its end, and the objects of its metrics.jsonl."""
    zoo("finetune", *args, "--out", out, **env)
    return read_metrics(out / "metrics.jsonl")
