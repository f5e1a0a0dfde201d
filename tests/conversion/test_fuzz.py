"""A short run of tools/fuzz_conversion.py, and proof that it sees what it is there to see."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.patience import PATIENCE_S
from tools.fuzz_cases import Case, bases, mutate
from tools.fuzz_conversion import Fuzz, Watch
from zoo.conversion import transfer
from zoo.conversion.disk import files, strict_json
from zoo.core.errors import UsageError
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_conversion.py"


@pytest.fixture(scope="module")
def registry():
    return Registry(Plugins.load())


@pytest.fixture(scope="module")
def whole(registry):
    """A checkpoint of one file, and one of shards."""
    found = {name.partition("/")[2]: content for name, content in bases(registry)}
    return found["single"], found["sharded"]


def test_broken_checkpoints_end_in_one_line():
    """In a process of its own: the watch cannot be taken off again, nor the limit of memory."""
    command = [sys.executable, str(TOOL), "--examples", "600", "--seed", "1", "--no-extremes"]
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}  # thousands of small files
    done = subprocess.run(
        command, env=os.environ | memory, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == 0
    outcomes = report["outcomes"]
    assert all(outcomes[f"{kind} refused"] > 30 for kind in ("header", "index", "config", "file"))
    assert all(outcomes[f"{kind} converted"] > 0 for kind in ("header", "index", "config", "file", "unbroken"))


def test_a_seed_fixes_every_case(whole):
    kinds = ["header", "index", "config", "file"] * 9

    def drawn():
        return [mutate(random.Random(f"5-{i}"), whole[1], kind) for i, kind in enumerate(kinds)]

    assert drawn() == drawn()


@pytest.fixture
def fuzz(registry, tmp_path):
    """The same, without the limits of a process."""
    (tmp_path / "secret").write_bytes(b"what nobody may copy")
    return Fuzz(tmp_path, registry, Watch(tmp_path))


def test_it_sees_a_traceback(fuzz, whole, monkeypatch):
    monkeypatch.setattr(strict_json, "_check_depth", lambda *_: 1 / 0)
    fuzz.run(Case(dict(whole[0])), "case", "config")
    assert "ZeroDivisionError" in fuzz.failures[0]


def test_it_sees_a_file_from_outside(fuzz, whole, monkeypatch):
    monkeypatch.setattr(files, "_inside", lambda file: Path(os.path.realpath(file)))
    fuzz.run(Case(dict(whole[0]), links={"LICENSE": "../secret"}), "case", "file")
    assert "copied a file from outside" in fuzz.failures[0]
    fuzz.watch.on = True
    fuzz.watch("open", (str(fuzz.work / "secret"), "r", 0))
    fuzz.watch("open", (str(fuzz.work / "source/config.json"), "w", 0))
    fuzz.watch("os.remove", (str(fuzz.work / "secret"), -1))
    fuzz.watch("pickle.find_class", ("os", "system"))
    fuzz.watch("open", (str(fuzz.work / "target/out/config.json"), "w", 0))
    assert len(fuzz.watch.seen) == 4


def test_it_sees_lines_that_are_none(fuzz, whole, monkeypatch):
    def refuse(*_):
        raise UsageError("a" * 2000)

    monkeypatch.setattr(transfer, "family_of", refuse)
    fuzz.run(Case(whole[0]), "case", "config")
    assert "no single printable line" in fuzz.failures[0]
