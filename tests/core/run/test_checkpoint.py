"""What a finished checkpoint is, what a death or a copy leaves behind, and how the next run puts it right."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from zoo.core.errors import DataError, UsageError
from zoo.core.run.checkpoint import Checkpoints, _unloadable
from zoo.core.storage import finished
from zoo.core.storage.checksums import NAME, Checksums, sum_of_file


def written(folder, step, *, checksums=True):
    """A folder with the files of a checkpoint."""
    for name, text in (
        ("progress.json", f'{{"step": {step}, "seq": 8, "global_batch": 1, "tokens": 8, "trained_tokens": 8}}'),
        ("hub/config.json", "{}"),
        ("state/.metadata", "metadata"),
        ("state/__0_0.distcp", "weights and moments"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if checksums:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        Checksums(folder, {name: sum_of_file(folder / name) for name in names}).write()


@pytest.fixture
def checkpoints(tmp_path):
    """Three finished saves of which one is kept, and two that never were finished."""
    made = Checkpoints(tmp_path, keep=1)
    for name in ("step-1", "step-2", "step-10", ".unfinished-step-11", ".unfinished-step-3"):
        written(made.root / name, int(name.rpartition("-")[2]))
    (made.root / "latest").symlink_to("step-2")
    return made


def names(checkpoints):
    return sorted(path.name for path in checkpoints.root.iterdir())


def flip(file, position=3):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


# After a death or a copy --------------------------------------------------------------------------


def test_a_run_that_starts_points_at_the_last_save_and_sweeps(checkpoints):
    (checkpoints.root / ".latest-new").symlink_to("step-11")
    assert checkpoints.tidy() == []
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


def test_a_latest_that_a_copy_made_a_folder_is_renamed_and_nothing_of_it_is_lost(checkpoints):
    (checkpoints.root / "latest").unlink()
    for _ in range(2):
        shutil.copytree(checkpoints.root / "step-10", checkpoints.root / "latest")
        (note,) = checkpoints.tidy()
        assert "latest was no link and is now latest.aside" in note
        assert os.readlink(checkpoints.root / "latest") == "step-10"
        (checkpoints.root / "latest").unlink()
    assert finished.damage(checkpoints.root / "latest.aside-2") is None
    assert checkpoints.steps() == [1, 2, 10]


def test_what_is_being_deleted_is_no_longer_a_save(checkpoints, monkeypatch):
    """As a kill would leave it: not a file is deleted under a name that `steps` knows."""
    deleted = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append((path.name, checkpoints.steps())))
    checkpoints._prune()
    assert checkpoints.steps() == [10]
    assert {name for name, _ in deleted} == {f".unfinished-step-{n}" for n in (1, 11, 2, 3)}
    assert all(steps == [10] for _, steps in deleted)


# What a finished one is ---------------------------------------------------------------------------


def truncate(file, size=5):
    os.truncate(file, size)


FLAWS = {
    "no file that says it is one": (lambda path: [(path / name).unlink() for name in ("progress.json", NAME)], None),
    "progress.json is gone": (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
    "progress.json is no JSON": (lambda path: (path / "progress.json").write_text("{"), "progress.json cannot be read"),
    "progress.json is no text": (lambda path: (path / "progress.json").write_bytes(b"\xff"), "cannot be read"),
    "progress.json names no step": (lambda path: (path / "progress.json").write_text("[]"), "names no step"),
    "it is of another step": (lambda path: [shutil.rmtree(path), written(path, 11)], "progress.json is of step 11"),
    "progress.json is a pipe": (
        lambda path: [(path / "progress.json").unlink(), os.mkfifo(path / "progress.json")],
        "progress.json cannot be read: it is no regular file",
    ),
    "metadata is gone": (lambda path: (path / "state/.metadata").unlink(), "state/.metadata is missing"),
    "a file of a rank is gone": (lambda path: (path / "state/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a file was cut": (lambda path: truncate(path / "state/__0_0.distcp"), "has 5 bytes and not 19"),
    "a file came": (lambda path: (path / "state/__1_0.distcp").touch(), "__1_0.distcp was not there"),
    "a template came": (lambda path: (path / "hub/chat_template.jinja").touch(), "chat_template.jinja was not there"),
    "checksums changed": (lambda path: flip(path / NAME, 40), f"{NAME} is damaged"),
    "checksums are half": (lambda path: truncate(path / NAME, 60), f"{NAME} is damaged"),
    "checksums are empty": (lambda path: truncate(path / NAME, 0), f"{NAME} is damaged"),
}
"""What happened to a folder `step-10`, and words about it; None if it is no checkpoint at all."""


@pytest.mark.parametrize("happened", FLAWS)
def test_a_folder_that_is_not_whole_is_no_checkpoint_and_costs_no_other(checkpoints, happened):
    """Every reader asks the same judge: steps, find, resume, done, tidy, prune."""
    change, words = FLAWS[happened]
    newest, run = checkpoints.root / "step-10", checkpoints.run
    change(newest)
    assert checkpoints.steps() == [1, 2]
    checkpoints.tidy()
    assert os.readlink(checkpoints.root / "latest") == "step-2"
    checkpoints._prune()
    assert checkpoints.steps() == [2]
    assert newest.is_dir()
    if words is None:
        assert finished.find(run) == finished.resume_point(run, "auto") == checkpoints.path(2)
        assert not finished.is_done(checkpoints.path(2), run, 10)
        return
    for ask in (finished.find, lambda path: finished.resume_point(path, "auto")):
        with pytest.raises(DataError) as error:
            ask(run)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert "the newest intact checkpoint is step-2: give " in str(error.value)
    assert str(error.value).endswith(f"give --resume {checkpoints.path(2)}")
    # What was advised is then really done.
    saved = finished.resume_point(run, f"{checkpoints.path(2)}")
    assert saved == checkpoints.path(2)
    assert not finished.is_done(saved, run, 10)
    (note,) = checkpoints.make_way(2)
    assert "step-10 is damaged and is now step-10.aside" in note
    assert finished.resume_point(run, "auto") == checkpoints.path(2)


LEFT_BY_OTHERS = ".DS_Store", "state/.nfs000a", "state/._.metadata", "state/.___0_0.distcp", "hub/config.json~", "a/b"


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_files_that_are_never_read_may_come_and_go(checkpoints, name):
    """Finder, NFS, AppleDouble, editors: resuming must not cost the steps since the checkpoint before."""
    newest = checkpoints.path(10)
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).touch()
    assert finished.find(checkpoints.run) == finished.resume_point(checkpoints.run, "auto") == newest


@pytest.mark.parametrize("name", ["step-", "step-07", "step-1x", "step-\u0663", "step--1", "step-10.aside", "Step-12"])
def test_only_a_plain_number_names_a_step(checkpoints, name):
    written(checkpoints.root / name, 12)
    assert checkpoints.steps() == [1, 2, 10]


def test_a_stray_file_or_link_in_the_place_of_a_step_is_no_checkpoint(checkpoints):
    (checkpoints.root / "step-20").touch()
    (checkpoints.root / "step-21").symlink_to("nowhere")
    assert checkpoints.steps() == [1, 2, 10]
    assert finished.resume_point(checkpoints.run, "auto") == checkpoints.path(10)


def test_one_changed_byte_of_the_newest_names_the_newest_that_is_intact(checkpoints):
    flip(checkpoints.path(10) / "state/__0_0.distcp")
    flip(checkpoints.path(2) / "hub/config.json", 0)
    assert "CRC-32" in finished.damage(checkpoints.path(10))
    assert "the newest intact checkpoint is step-1: give " in str(finished.damaged(checkpoints.path(10), "why"))
    flip(checkpoints.path(1) / "progress.json")
    for flag in ("", "--resume "):
        said = str(finished.damaged(checkpoints.path(10), "why", flag=flag))
        assert "no earlier checkpoint of the run is intact" in said


def test_what_is_advised_can_be_typed_whatever_the_run_is_called(tmp_path):
    """By the rules of the shell, as shlex splits."""
    made = Checkpoints(tmp_path / "Tom's first run", keep=1)
    for step in (1, 2):
        written(made.path(step), step)
    flip(made.path(2) / "hub/config.json", 0)
    line = str(finished.damaged(made.path(2), "why", flag="--resume "))
    assert shlex.split(line.partition(": give ")[2]) == ["--resume", str(made.path(1))]
    line = str(finished.changed_directory(made.root, "why"))
    assert shlex.split(line.rpartition(": ")[2]) == ["rm", str(made.root / NAME)]
    line = str(_unloadable(made.root, "why"))
    typed = line[line.index("mv ") : line.index(" goes back")]
    assert shlex.split(typed) == ["mv", str(made.root), f"{made.root}.aside"]


def test_an_older_checkpoint_is_resumed_only_where_all_newer_ones_are_damaged(checkpoints):
    older = str(checkpoints.path(1))
    flip(checkpoints.path(10) / "state/__0_0.distcp")
    with pytest.raises(UsageError, match="is older than step-2 in"):
        finished.resume_point(checkpoints.run, older)
    flip(checkpoints.path(2) / "state/__0_0.distcp")
    assert finished.resume_point(checkpoints.run, older) == checkpoints.path(1)
    checkpoints.make_way(1)
    assert names(checkpoints)[-3:] == ["step-1", "step-10.aside", "step-2.aside"]


def test_ranks_that_are_started_again_go_on_from_what_they_saved_since(checkpoints, tmp_path):
    run, empty = checkpoints.run, tmp_path / "empty"
    for resume, wanted in (
        ("auto", "auto"),
        ("never", "auto"),
        (f"{checkpoints.path(2)}", "auto"),
        (f"{checkpoints.path(10)}", f"{checkpoints.path(10)}"),
    ):
        assert finished.resume_after_restart(run, resume) == wanted
        assert finished.resume_after_restart(empty, resume) == resume


def test_one_that_an_older_zoo_saved_is_finished_without_checksums(checkpoints):
    shutil.rmtree(checkpoints.path(10))
    written(checkpoints.path(10), 10, checksums=False)
    assert checkpoints.steps() == [1, 2, 10]
    assert finished.resume_point(checkpoints.run, "auto") == checkpoints.path(10)
    with pytest.raises(DataError, match=r"step-10/progress\.json has no 'cursor'"):
        finished.resumable_progress(checkpoints.path(10))
    (checkpoints.path(10) / "state/__0_0.distcp").unlink()
    with pytest.raises(DataError, match="has no .distcp file"):
        finished.find(checkpoints.run)


def test_a_state_behind_a_link_to_another_disk_is_whole(checkpoints, tmp_path):
    (checkpoints.path(10) / "state").rename(tmp_path / "elsewhere")
    (checkpoints.path(10) / "state").symlink_to(tmp_path / "elsewhere")
    assert finished.damage(checkpoints.path(10)) is None


def test_a_step_behind_a_link_is_one_of_its_run(checkpoints, tmp_path):
    """Its name is that of the link, and the steps before it are its neighbours in the run."""
    newest = checkpoints.path(10)
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert finished.is_done(newest, checkpoints.run, 10)
    flip(newest / "state/__0_0.distcp")
    assert str(finished.damaged(newest, "why")).endswith(f"give {checkpoints.path(2)}")
    checkpoints.path(11).symlink_to("step-2")
    with pytest.raises(DataError, match=r"step-11 is damaged: .*/progress.json is of step 2; .* is step-2: give "):
        finished.resume_point(checkpoints.run, "auto")


def test_a_directory_of_an_export_is_no_checkpoint_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    Checksums(tmp_path, {"config.json": sum_of_file(tmp_path / "config.json")}).write()
    with pytest.raises(UsageError, match="neither a run nor a checkpoint"):
        finished.find(Path(tmp_path))
