"""What a death in the middle of a save leaves behind, and how the next run puts it right."""

from __future__ import annotations

import os
import shutil

import pytest

from zoo.core.checkpoint import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """Three finished saves of which one is kept, and two that never were finished."""
    made = Checkpoints(tmp_path, keep=1)
    for name in ("step-1", "step-2", "step-10", ".unfinished-step-11", ".unfinished-step-3"):
        (made.root / name).mkdir(parents=True)
        (made.root / name / "progress.json").write_text("{}")
    (made.root / "latest").symlink_to("step-2")
    return made


def names(checkpoints):
    return sorted(path.name for path in checkpoints.root.iterdir())


def test_a_run_that_starts_points_at_the_last_save_and_sweeps(checkpoints):
    (checkpoints.root / ".latest-new").symlink_to("step-11")
    checkpoints.tidy()
    assert os.readlink(checkpoints.root / "latest") == "step-10"
    assert names(checkpoints) == ["latest", "step-1", "step-10", "step-2"]
    checkpoints.tidy()
    assert names(checkpoints) == ["latest", "step-1", "step-10", "step-2"]


def test_a_link_that_was_lost_comes_back_and_none_is_made_of_nothing(checkpoints, tmp_path):
    (checkpoints.root / "latest").unlink()
    checkpoints.tidy()
    assert os.readlink(checkpoints.root / "latest") == "step-10"
    empty = Checkpoints(tmp_path / "empty", keep=1)
    empty.tidy()
    assert not empty.root.exists()


def test_what_is_being_deleted_is_no_longer_a_save(checkpoints, monkeypatch):
    """As a kill would leave it: not a file is deleted under a name that `steps` knows."""
    deleted = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append((path.name, checkpoints.steps())))
    checkpoints._prune()
    assert checkpoints.steps() == [10]
    assert sorted(name for name, _ in deleted) == [f".unfinished-step-{n}" for n in (1, 11, 2, 3)]
    assert all(steps == [10] for _, steps in deleted)
