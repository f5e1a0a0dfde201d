"""Byte-range reading equals safetensors' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from zoo.conversion.disk import ranges
from zoo.conversion.disk.directory import open_directory
from zoo.conversion.disk.hub_source import HubSource
from zoo.core.model.rules import whole

SHAPES = {"matrix": (11, 7), "vector": (13,), "scalar": (), "empty": (0, 4), "cube": (5, 3, 4), "flat": (3, 0)}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def stored(request, tmp_path_factory):
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(request.param) for name, shape in SHAPES.items()}
    file = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(tensors, file)
    return tensors, HubSource.single(file)


@pytest.mark.parametrize("name", SHAPES)
def test_whole_tensors(stored, name):
    tensors, source = stored
    assert source.shape(name) == SHAPES[name]
    assert source.dtype(name) == str(tensors[name].dtype).removeprefix("torch.")
    assert torch.equal(source.read(name, whole(SHAPES[name])), tensors[name])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_piece(stored, data):
    tensors, source = stored
    name = data.draw(st.sampled_from([name for name, shape in SHAPES.items() if shape]))
    index = []
    for size in SHAPES[name]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_WIDE", data.draw(st.sampled_from([256, 1 << 20])))
        patch.setattr(ranges, "_SHORT", data.draw(st.sampled_from([0, 16, 4096])))
        assert torch.equal(source.read(name, tuple(index)), tensors[name][tuple(index)])


def test_an_index_outside_is_an_error(stored):
    with pytest.raises(ValueError, match="outside"):
        stored[1].read("vector", (slice(0, 14),))


def test_rows_are_read_without_the_rest(stored, monkeypatch):
    tensors, source = stored
    read = []
    preadv = ranges.os.preadv
    monkeypatch.setattr(ranges.os, "preadv", lambda fd, views, at: read.append(len(views[0])) or preadv(fd, views, at))
    source.read("matrix", (slice(4, 6), slice(0, 7)))
    assert read == [2 * 7 * tensors["matrix"].itemsize]


def test_a_sharded_checkpoint_is_one_source(sharded):
    source = open_directory(sharded).tensors
    assert len(source.names()) == 21
    assert source.shape("model.layers.1.mlp.down_proj.weight") == (32, 48)
    assert str(source) == str(sharded)


def test_files_are_closed_with_the_source(sharded):
    import os

    source = open_directory(sharded).tensors
    for name in source.names():
        source.read(name, whole(source.shape(name)))
    opened = list(source._files._descriptors.values())
    assert len(opened) >= 3
    del source
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
