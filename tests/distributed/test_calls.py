"""Ranks import what their command imports, and a program may call `zoo.finetune` again, with other ranks each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from tests.harness.patience import PATIENCE_S
from tests.harness.pooled_command import joined_in_turn
from zoo.core.run.metrics import read_metrics

pytestmark = pytest.mark.dist

PROGRAM = """
import json, os, sys, threading
sys.path[:0] = sys.argv[1:3]
import zoo, zoo.core.api
from zoo.core.errors import ZooError

FLAGS = {"seq": 64, "steps": 1}
def environment():
    # But what torch sets when it is first used.
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}

before = environment()
sys.path.insert(0, os.getcwd())
try:
    zoo.finetune("llama3", cp=2, out=sys.argv[3] + "/broken", **FLAGS)
except ZooError as error:
    said = str(error)
del sys.path[0]
thread = threading.Thread(target=zoo.finetune, args=["llama3"], kwargs=dict(cp=2, out=sys.argv[3] + "/cp", **FLAGS))
thread.start()
thread.join()
zoo.finetune("llama3", dp_shard=2, out=sys.argv[3] + "/dp", **FLAGS)
print(json.dumps({"broken": said, "environment": sorted(environment().items() ^ before.items())}))
"""
PLUGIN = """
import sys
import helper
import zoo

@zoo.hookimpl
def zoo_run_start(run):
    (run.path / helper.NAME).write_text(f"{sys.flags.isolated} {sys.warnoptions} {sys.path[0]}")
"""


def test_ranks_import_what_a_program_imports_and_nothing_of_the_working_directory(tmp_path):
    """A plugin and its helper are beside the program, and `random.py` in the working directory is nobody's."""
    beside, cwd = tmp_path / "beside", tmp_path / "cwd"
    (beside / "mine-1.0.dist-info").mkdir(parents=True)
    (beside / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (beside / "mine-1.0.dist-info" / "entry_points.txt").write_text("[zoo]\nmine = mine\n")
    (beside / "mine.py").write_text(PLUGIN)
    (beside / "helper.py").write_text("NAME = 'seen'\n")
    (beside / "program.py").write_text(PROGRAM)
    cwd.mkdir()
    (cwd / "random.py").write_text("raise RuntimeError('not the library')\n")
    command = [sys.executable, "-I", "-W", "ignore::FutureWarning", beside / "program.py"]
    root = Path(zoo.__file__).parents[1]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*map(str, command), str(beside), str(root), str(tmp_path)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "before it could say why; its last words: RuntimeError: not the library" in said["broken"]
    assert f'(File "{cwd}/random.py", line 1, in <module>)' in said["broken"]
    assert said["environment"] == []
    for run in ("cp", "dp"):
        assert len(read_metrics(tmp_path / run / "metrics.jsonl")) == 1
        assert (tmp_path / run / "seen").read_text() == f"1 ['ignore::FutureWarning'] {beside}"


def test_ranks_of_an_outer_launcher_train_again_in_the_same_processes(tmp_path):
    """Each call has another layout, so nothing of the process groups before may be left."""
    layouts = [("--cp", "2"), ("--dp-shard", "2"), ("--tp", "2"), ("--cp", "2")]
    job = ("finetune", "llama3", "--seq", "64", "--steps", "2", "--global-batch", "2", "--dtype", "float64")
    calls = [(*job, *layout, "--out", tmp_path / str(number)) for number, layout in enumerate(layouts)]
    for answers in joined_in_turn(calls, world=2):
        assert [status for status, _ in answers] == [0] * len(calls), answers
    found = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / str(number) / "metrics.jsonl")]
        for number in range(len(calls))
    ]
    for other in found[1:]:
        assert other == [pytest.approx(step, rel=1e-9) for step in found[0]]
