"""Bytes that change in a run, in one of its checkpoints, in an import: whoever reads them says so in one line."""

from __future__ import annotations

import errno
import os
import random
import shutil

import pytest
import torch

import zoo
from tests.harness.pooled_command import command
from zoo.cli.main import main
from zoo.conversion.disk.directory import open_directory
from zoo.conversion.run.converter import RunConverter
from zoo.core.errors import DataError
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics
from zoo.core.storage import finished
from zoo.core.storage.checksums import NAME, Checksums

POSITIONS = 200
JOB = ("llama3", "--seq", "64", "--save-every", "2", "--keep", "3", "--set", "log.peak_tflops=1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"Line {number} of a text that says little.\n\n" for number in range(50)))
    return file


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of six steps with three checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["finetune", *JOB, "--data", str(text), "--steps", "6", "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


@pytest.fixture
def imported(whole, tmp_path):
    """A directory that an import wrote."""
    assert main(["export", str(whole), str(tmp_path / "exported")]) == 0
    assert main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 0
    return tmp_path / "imported"


def flip(file, position=-1, bit=0):
    """Change one bit, and return a function that changes it back."""
    position %= file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << bit]))
    return lambda: flip(file, position, bit)


def said(capfd, *words, status=5):
    """The last line of a command that fails; it was no traceback."""
    capfd.readouterr()
    assert main([str(word) for word in words]) == status
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


# Every byte ---------------------------------------------------------------------------------------


def of_checkpoint(root):
    if reason := finished.damage(root / "checkpoints" / "step-6"):
        raise DataError(reason)


def of_run(root):
    opened = RunConverter().open(RunConverter().locate(str(root)))
    finished.require_intact(opened.checksums, of_run=True)


def of_import(root):
    finished.require_intact(open_directory(root).checksums, of_run=False)


@pytest.mark.parametrize(
    ("kind", "inner", "check"),
    [("run", "checkpoints/step-6", of_checkpoint), ("run", "checkpoints/step-6", of_run), ("imported", ".", of_import)],
)
def test_every_single_byte_that_changes_is_found(request, kind, inner, check):
    """Positions are drawn over all bytes, and some in each file, for most bytes are in one."""
    root, chance = request.getfixturevalue(kind), random.Random(0)
    check(root)
    files = sorted(path for path in (root / inner).rglob("*") if path.is_file())
    assert NAME in [path.name for path in files]
    sizes = [path.stat().st_size for path in files]
    drawn = [files[n % len(files)] for n in range(POSITIONS // 2)] + chance.choices(files, sizes, k=POSITIONS // 2)
    for file in drawn:
        back = flip(file, chance.randrange(file.stat().st_size), chance.randrange(8))
        with pytest.raises(DataError) as error:
            check(root)
        assert file.name in str(error.value)
        assert str(error.value).isprintable()
        back()
    check(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "state/__9_0.distcp").touch(),
        lambda root: (root / "hub/tokenizer.json").unlink(),
        lambda root: os.truncate(root / "state/__0_0.distcp", 100),
    ],
)
def test_a_file_more_or_less_or_shorter_is_found(run, change):
    change(run / "checkpoints/step-6")
    with pytest.raises(DataError, match="the newest intact checkpoint is step-4"):
        of_run(run)


# A damaged run ------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_one_line_and_what_it_advises_works(run, whole, text, tmp_path, capfd):
    steps = run / "checkpoints"
    flip(steps / "step-6/state/__0_0.distcp", 3_000_000)
    job = ("finetune", *JOB, "--data", text, "--steps", "8", "--out", run)
    wrong = f"{steps}/step-6 is damaged: {steps}/step-6/state/__0_0.distcp has CRC-32 "
    advice = f"the newest intact checkpoint is step-4: give {steps}/step-4"
    for words in (
        ("export", run, tmp_path / "out"),
        ("export", steps / "latest", tmp_path / "out"),
        ("finetune", *JOB, "--data", text, "--from", run, "--out", tmp_path / "other"),
    ):
        line = said(capfd, *words)
        assert "is damaged: " in line
        assert "__0_0.distcp has CRC-32" in line
        assert "the newest intact checkpoint is step-4: give " in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError) as error:
        zoo.load(run)
    assert str(error.value).startswith(wrong)
    assert str(error.value).endswith(advice)
    line = said(capfd, *job)
    assert line.startswith(f"Error: {wrong}")
    assert line.endswith(advice.replace("give ", "give --resume "))
    assert Checkpoints(run, keep=1).steps() == [2, 4, 6]
    # It is not "done" either, with a damaged last step in the way.
    assert main([str(word) for word in (*job, "--steps", "6", *line.split()[-2:])]) == 0
    assert "step-6 is damaged and is now step-6.aside" in capfd.readouterr().err
    assert finished.damage(steps / "step-6") is None
    state = "checkpoints/step-6/state/__0_0.distcp"
    assert (run / state).read_bytes() == (whole / state).read_bytes()
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    # And the same command goes on now, without the flag.
    assert main([str(word) for word in job]) == 0
    assert (steps / "step-6.aside").is_dir()


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones_that_are_intact(run, text, capfd):
    flip(run / "checkpoints/step-6/progress.json", 0)
    job = ("finetune", *JOB, "--data", text, "--steps", "8", "--out", run, "--resume", run / "checkpoints/step-2")
    assert "is older than step-4 in" in said(capfd, *job, status=2)


@pytest.mark.dist
def test_ranks_agree_about_a_damaged_checkpoint(run, text, capfd):
    flip(run / "checkpoints/step-6/state/__0_0.distcp", 3_000_000)
    job = ("finetune", *JOB, "--data", text, "--steps", "7", "--cp", "2", "--out", run)
    command(*job, status=5)
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert line.endswith(f"give --resume {run}/checkpoints/step-4")
    assert "Traceback" not in err
    command(*job, "--resume", run / "checkpoints/step-4")
    assert Checkpoints(run, keep=1).steps() == [4, 6, 7]


def test_a_state_of_another_model_is_no_damage(run, text, capfd):
    words = ("--set", "model.num_hidden_layers=1", "--from", "scratch", "--resume", run / "checkpoints/step-6")
    job = ("finetune", *JOB, "--data", text, "--out", run.parent / "new", *words)
    line = said(capfd, *job, status=2)
    assert "is damaged" not in line
    assert "began from the weights of its size" in line


# Without checksums --------------------------------------------------------------------------------


def test_a_run_of_an_older_zoo_is_read_and_a_line_says_that_it_was_not_compared(run, text, tmp_path, capfd):
    for file in (run / "checkpoints").rglob(NAME):
        file.unlink()
    capfd.readouterr()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "step-6, which has no checksums, so it was read unchecked" in capfd.readouterr().err
    assert (tmp_path / "out" / NAME).is_file()
    with pytest.warns(UserWarning, match="has no checksums, so it is read unchecked"):
        zoo.load(run)
    assert main(["finetune", *JOB, "--data", str(text), "--steps", "7", "--out", str(run)]) == 0
    assert "step-6 has no checksums, as an older zoo saved it" in capfd.readouterr().err
    (run / "checkpoints/step-7" / NAME).unlink()
    flip(run / "checkpoints/step-7/state/.metadata", 0)
    line = said(capfd, "finetune", *JOB, "--data", text, "--steps", "8", "--out", run)
    assert f"mv {run}/checkpoints/step-7 {run}/checkpoints/step-7.aside" in line


# Copies and accidents -----------------------------------------------------------------------------


@pytest.mark.parametrize("symlinks", [True, False])
def test_a_copy_of_a_run_resumes_and_saves_as_the_run_itself(whole, text, tmp_path, symlinks):
    """With links kept, and followed as `cp -rL` does; its folders read-only, as on a snapshot."""
    copy = shutil.copytree(whole, tmp_path / "copy", symlinks=symlinks)
    for folder in (copy / "checkpoints").glob("step-*/*"):
        folder.chmod(0o555)
    assert main(["finetune", *JOB, "--data", str(text), "--steps", "8", "--keep", "1", "--out", str(copy)]) == 0
    assert os.readlink(copy / "checkpoints/latest") == "step-8"
    assert Checkpoints(copy, keep=1).steps() == [8]
    assert (copy / "checkpoints/latest.aside").is_dir() != symlinks


def test_an_empty_folder_of_a_later_step_is_neither_done_nor_in_the_way(run, text, capfd):
    (run / "checkpoints/step-7").mkdir()
    (run / "checkpoints/step-7/notes.txt").write_text("mine")
    capfd.readouterr()
    assert main(["finetune", *JOB, "--data", str(text), "--steps", "7", "--out", str(run)]) == 0
    assert "step-7 is no checkpoint, for it has no progress.json" in capfd.readouterr().err
    assert finished.damage(run / "checkpoints/step-7") is None
    assert (run / "checkpoints/step-7.aside/notes.txt").read_text() == "mine"


def test_a_disk_that_is_full_when_checksums_are_written_is_a_failed_save(run, text, monkeypatch, capfd):
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / NAME))

    monkeypatch.setattr(Checksums, "write", full)
    line = said(capfd, "finetune", *JOB, "--data", text, "--steps", "7", "--out", run)
    assert f"saving {run}/checkpoints/step-7 failed: No space left on device" in line
    assert "step-6 is intact" in line
    assert Checkpoints(run, keep=1).steps() == [2, 4, 6]
    assert list((run / "checkpoints").glob(".unfinished*")) == []


# An import ----------------------------------------------------------------------------------------


def test_a_changed_weight_of_an_import_is_found_by_every_reader(imported, text, tmp_path, capfd):
    flip(imported / "model.safetensors")
    wrong = f"{imported}/model.safetensors has CRC-32 "
    train = ("finetune", *JOB, "--data", text, "--from", imported, "--out", tmp_path / "other")
    for words in (("export", imported, tmp_path / "out"), ("import", imported, tmp_path / "out"), train):
        line = said(capfd, *words)
        assert wrong in line
        assert line.endswith(f"go on without checksums: rm {imported}/{NAME}")
    with pytest.raises(DataError, match="has CRC-32"):
        zoo.load(imported)
    # Against what it was made from, the tensor is named.
    assert "is no copy of " in said(capfd, "import", "--verify", tmp_path / "exported", imported)


@pytest.mark.dist
def test_ranks_agree_about_a_changed_import(imported, text, tmp_path, capfd):
    flip(imported / "model.safetensors")
    command("finetune", *JOB, "--data", text, "--from", imported, "--cp", "2", "--out", tmp_path / "other", status=5)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert "model.safetensors has CRC-32 " in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "LICENSE"])
def test_a_directory_that_was_edited_on_purpose_is_refused_with_a_way_on(imported, text, name, capfd):
    """`zoo plan` finds it: small files are compared whenever a checkpoint is opened."""
    with (imported / name).open("a") as file:
        file.write("\n")
    job = ("plan", "llama3", "--seq", "64", "--data", text, "--from", imported)
    line = said(capfd, *job)
    assert f"{imported}/{name} " in line
    assert main(["import", str(imported), str(imported.parent / "again")]) == 5
    os.remove(line.split()[-1])
    assert main([str(word) for word in job]) == 0


def test_files_that_zoo_does_not_read_may_come(imported):
    for name in ("README.md", ".gitattributes", "training_args.bin"):
        (imported / name).write_text("of somebody else")
    of_import(imported)


def test_transformers_and_the_checksums_agree_about_an_import(imported):
    """The other file is nothing to transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32)
    ours = zoo.load(imported)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, ours(tokens), atol=1e-4)


def test_checksums_are_those_of_an_undisturbed_conversion_after_one_that_was_interrupted(whole, tmp_path):
    """Blocks that an earlier attempt wrote are summed as they are compared."""
    for name in ("one", "two"):
        assert main(["export", str(whole), str(tmp_path / name), "--shard-size", "400KB"]) == 0
        of_import(tmp_path / name)
    assert (tmp_path / "one" / NAME).read_bytes() == (tmp_path / "two" / NAME).read_bytes()
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
