"""The real `zoo` command in a process of its own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.patience import PATIENCE_S
from zoo.core.run.metrics import read_metrics


def start(*args, output=subprocess.PIPE, **env):
    """`zoo ARGS` as a running process; output is text on stdout and stderr, pipes if no file is given for both."""
    command = [sys.executable, "-m", "zoo", *map(str, args)]
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | env,
    )


def zoo(*args, status=0, **env):
    """`zoo ARGS` to its end; asserts the exit status and returns (stdout, stderr)."""
    process = start(*args, **env)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, f"zoo {' '.join(map(str, args))} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def train(out, *args, **env):
    """`zoo finetune ARGS --out OUT` to its end, and the objects of its metrics.jsonl."""
    zoo("finetune", *args, "--out", out, **env)
    return read_metrics(out / "metrics.jsonl")
