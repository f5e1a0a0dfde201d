"""A run whose command is typed again after each of ten deaths. A file of its own, so that another worker has it."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.distributed.test_survival import (
    JOB,
    losses,
    undisturbed,  # noqa: F401
    undisturbed_run,  # noqa: F401
    wait_for_a_save,
    wait_for_workers,
)
from tests.harness.command import start, zoo
from tests.harness.patience import PATIENCE_S
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

KILLS = 10


@pytest.mark.dist
@pytest.mark.slow
def test_ten_killed_workers_leave_no_trace_in_the_losses(request, tmp_path):
    wanted = request.getfixturevalue("undisturbed")
    run, chance = tmp_path / "run", random.Random(0)
    for number in range(KILLS):
        already = max(Checkpoints(run, keep=1).steps(), default=0)
        process = start("finetune", *JOB, "--out", run)
        victims = wait_for_workers(process, run, already)
        if number % 2:
            wait_for_a_save(run)
        else:
            time.sleep(chance.uniform(0, 0.5))
        os.kill(chance.choice(victims), signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE_S)
        if process.returncode == 0:  # it was faster than the kill
            break
        assert process.returncode == 1, err
        assert "was killed by SIGKILL" in err
        assert "Traceback" not in err
    zoo("finetune", *JOB, "--out", run)
    assert losses(read_metrics(run / "metrics.jsonl")) == wanted
