"""A run as a source: single tensors of its state, its config and files, and no foreign pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from zoo.conversion.disk.directory import open_directory
from zoo.conversion.run.converter import RunConverter, RunSource
from zoo.core.errors import DataError, UsageError
from zoo.core.model.load import ModuleSource, load_into
from zoo.core.model.rules import whole
from zoo.models.llama3.model import SPEC
from zoo.testing import ranks


@pytest.fixture
def run(checkpoint, tmp_path):
    """A run directory as training leaves it, of two checkpoints; the second has the weights of `checkpoint`."""
    opened = open_directory(checkpoint)
    model = SPEC.build(SPEC.parse(opened.config))
    for step in (2, 10):
        if step == 10:
            load_into(model, opened.tensors, ())
        path = tmp_path / "run" / "checkpoints" / f"step-{step}"
        weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        others = {f"optim.state.{name}.exp_avg": torch.zeros(1) for name, _ in model.named_parameters()}
        (path / "state").mkdir(parents=True)
        with warnings.catch_warnings(action="ignore"):
            save(weights | others | {"optim.lr": 1e-3}, storage_writer=FileSystemWriter(path / "state"), no_dist=True)
        shutil.copytree(checkpoint, path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "progress.json").write_text(json.dumps({"step": step}))
    (tmp_path / "run/checkpoints/latest").symlink_to("step-10")
    (tmp_path / "run/checkpoints/.unfinished-step-12").mkdir()
    return tmp_path / "run"


def test_a_run_means_its_last_checkpoint(run):
    converter = RunConverter()
    assert converter.locate(str(run)) == run / "checkpoints/step-10"
    assert converter.locate(str(run / "checkpoints/step-2")) == run / "checkpoints/step-2"
    assert converter.locate(str(run / "checkpoints/latest")).resolve() == run / "checkpoints/step-10"
    assert converter.locate(str(run.parent / "source")) is None
    assert converter.locate("owner/name") is None


def test_tensors_are_those_that_were_saved(run, checkpoint):
    opened, original = RunConverter().open(run / "checkpoints/step-10"), open_directory(checkpoint)
    assert opened.own_names
    assert opened.config == original.config
    assert set(opened.files) == set(original.files)
    assert set(opened.tensors.names()) == set(original.tensors.names())
    for name in original.tensors.names():
        index = whole(original.tensors.shape(name))
        assert opened.tensors.shape(name) == original.tensors.shape(name)
        assert opened.tensors.dtype(name) == "float32"
        assert torch.equal(opened.tensors.read(name, index), original.tensors.read(name, index))
    name, piece = "model.layers.0.mlp.up_proj.weight", (slice(3, 7), slice(5, 6))
    assert torch.equal(opened.tensors.read(name, piece), original.tensors.read(name, piece))


def test_only_the_asked_bytes_are_read(run, monkeypatch):
    source, read = RunSource(run / "checkpoints/step-10/state"), []
    source.read("lm_head.weight", (slice(0, 1), slice(0, 32)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read.append(len(views[0])) or preadv(fd, views, at))
    source.read("lm_head.weight", (slice(7, 9), slice(0, 32)))
    assert read == [2 * 32 * 4]


def save_quarter(directory, full):
    mesh = init_device_mesh("cpu", (2, 2))
    quarter = distribute_tensor(full, mesh, (Shard(0), Shard(1)))
    save({"model.w": quarter}, storage_writer=FileSystemWriter(directory))


@pytest.mark.dist
def test_a_tensor_that_was_cut_among_ranks(tmp_path):
    full = torch.arange(7 * 6, dtype=torch.float32).view(7, 6).to(torch.bfloat16)
    ranks.run(4, save_quarter, str(tmp_path), full)
    source = RunSource(tmp_path)
    assert len(source._pieces("w")) == 4
    for index in (whole((7, 6)), (slice(2, 6), slice(1, 5)), (slice(6, 7), slice(0, 6)), (slice(3, 3), slice(0, 6))):
        assert torch.equal(source.read("w", index), full[index])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.randn(4, 6).t(), "not in C order"),
        (torch.zeros(3, dtype=torch.int64), "must not name torch.LongStorage"),
    ],
)
def test_chunks_that_are_no_weights(tmp_path, tensor, words):
    with warnings.catch_warnings(action="ignore"):
        save({"model.w": tensor}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(DataError, match=words) as error:
        RunSource(tmp_path).read("w", whole(tuple(tensor.shape)))
    assert "\n" not in str(error.value)


def test_a_run_without_a_finished_checkpoint(run):
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="no finished checkpoint"):
        RunConverter().locate(str(run))


def test_damaged_state_is_one_line(run):
    state = run / "checkpoints/step-10/state"
    data = next(state.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    source = RunSource(state)
    with pytest.raises(DataError, match=r"lm_head\.weight cannot be read") as error:
        source.read("lm_head.weight", whole(source.shape("lm_head.weight")))
    assert "\n" not in str(error.value)
    (state / ".metadata").unlink()
    with pytest.raises(DataError, match="no readable checkpoint state"):
        RunSource(state)


class Evil:
    """Unpickled, it makes a directory."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (self.directory,)


def test_foreign_metadata_is_not_unpickled(run):
    state, mark = run / "checkpoints/step-10/state", run / "mark"
    (state / ".metadata").write_bytes(pickle.dumps(Evil(str(mark))))
    with pytest.raises(DataError, match=r"must not name \w+\.mkdir"):
        RunSource(state)
    assert not mark.exists()


def test_metadata_of_another_type(run):
    state = run / "checkpoints/step-10/state"
    (state / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="no checkpoint metadata"):
        RunSource(state)


def test_metadata_cannot_name_files_elsewhere(run):
    state = run / "checkpoints/step-10/state"
    metadata = pickle.loads((state / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match="no plain file name"):
        RunSource(state)


def test_a_run_is_never_written_by_an_export(run):
    with pytest.raises(UsageError, match="--to hf"):
        RunConverter().export(SPEC, None, ModuleSource(torch.nn.Module()), run, files={}, dtype=None)
