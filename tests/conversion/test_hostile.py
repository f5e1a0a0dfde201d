"""Checkpoints made to harm: each is refused in one line that names the file, the tensor and the rule."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from zoo.conversion.directory import open_directory
from zoo.conversion.headers import read_header
from zoo.conversion.hf import HfConverter
from zoo.core.errors import DataError
from zoo.core.rules import whole


def refusal(path) -> str:
    with pytest.raises(DataError) as error:
        open_directory(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit_index(directory, change) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def with_header(fields, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_pickles_are_never_read(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    assert HfConverter().locate(str(checkpoint)) == checkpoint
    assert "pytorch_model.bin is a pickle" in refusal(checkpoint)


def test_pickles_beside_safetensors_do_not_matter(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert open_directory(checkpoint).tensors.names()


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        ".hidden.safetensors",
        "pytorch_model.bin",
        "shard.safetensors\n",
        "shard.safetensors\x00",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_an_index_names_plain_safetensors_files_only(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    message = refusal(sharded)
    assert "index.json" in message
    assert "model.norm.weight" in message
    assert "plain name" in message


def test_a_path_out_of_the_directory_is_not_even_opened(sharded):
    outside = sharded.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, outside)
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": "../outside.safetensors"}))
    assert "plain name" in refusal(sharded)


def test_an_index_with_an_extra_tensor(sharded):
    edit_index(sharded, lambda w: w.update({"model.phantom.weight": w["model.norm.weight"]}))
    assert "'model.phantom.weight' is not in" in refusal(sharded)


def test_an_index_that_leaves_a_tensor_out(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    message = refusal(sharded)
    assert "'model.norm.weight'" in message
    assert "does not name" in message


def test_a_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(shards[0])
    other = next(iter(load_file(shards[1])))
    save_file(tensors | {other: torch.zeros(1)}, shards[0], metadata={"format": "pt"})
    message = refusal(sharded)
    assert other in message
    assert shards[0].name in message
    assert shards[1].name in message


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name}, which is missing" in refusal(sharded)


def test_a_huge_index(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {' + " " * (11 << 20) + "}}")
    assert "index.json: more than" in refusal(sharded)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[" * 100_000, "\xff"]
)
def test_an_index_of_another_kind(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "index.json" in refusal(sharded)


def test_single_file_and_index_together(sharded):
    save_file({"model.norm.weight": torch.ones(32)}, sharded / "model.safetensors")
    assert "both" in refusal(sharded)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file(checkpoint, kept):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    assert "model.safetensors" in refusal(checkpoint)


def test_a_file_with_something_behind_its_tensors(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    assert "model.safetensors" in refusal(checkpoint)


def test_a_file_that_becomes_shorter_after_it_was_checked(checkpoint):
    tensors = open_directory(checkpoint).tensors
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    last = max(tensors.names(), key=lambda name: tensors.tensors[name][1].start)
    with pytest.raises(DataError, match="became shorter"):
        tensors.read(last, whole(tensors.shape(last)))


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (with_header({"a": ONE}, b"\0" * 8, length=2**63), "truncated"),
        (with_header(b"x" * 10), "JSON"),
        (with_header(b"[" * 200_000), "JSON"),
        (with_header(b"[]"), "no JSON object"),
        (with_header(TWICE, b"\0" * 8), "appears twice"),
        (with_header({"a": ONE, "__metadata__": {"x": 1}}, b"\0" * 8), "cannot be read as safetensors"),
        (with_header(b'{"a": NaN}'), "NaN"),
        (with_header({"a": 1}), "'a'"),
        (with_header({"a": ONE | {"dtype": "I64", "shape": [1]}}, b"\0" * 8), "unquantised"),
        (with_header({"a": ONE | {"dtype": "F8_E4M3", "shape": [8]}}, b"\0" * 8), "unquantised"),
        (with_header({"a": ONE | {"shape": [3]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE | {"shape": [-2]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE | {"shape": [2.0]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE | {"shape": [True, 2]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE | {"data_offsets": [8, 0]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE, "b": ONE}, b"\0" * 8), "overlaps"),
        (with_header({"a": ONE | {"data_offsets": [8, 16]}}, b"\0" * 16), "hole"),
        (with_header({f"t{i}": 0 for i in range(200_001)}), "200000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_break_the_format(tmp_path, content, word):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_header(file)
    assert word in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_bomb_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 40 << 20))
        stream.truncate(8 + (40 << 20))
    with pytest.raises(DataError, match="more than the"):
        read_header(file)


def test_a_device_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_flipped_byte_is_a_data_error_or_another_valid_header(tmp_path, at, byte):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    content[at % len(content)] = byte
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert sum(tensor.length for tensor in tensors.values()) <= len(content)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 100_000, "\x00"])
def test_a_config_that_is_no_object(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    assert "config.json" in refusal(checkpoint)


def test_a_missing_and_a_huge_config(checkpoint):
    (checkpoint / "config.json").write_text(" " * (2 << 20))
    assert "config.json: more than" in refusal(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refusal(checkpoint)


def test_code_in_a_config_is_dropped(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    assert "auto_map" not in open_directory(checkpoint).config


def test_symbolic_links_into_a_cache_are_followed(checkpoint, tmp_path):
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    (checkpoint / "model.safetensors").rename(blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    assert len(open_directory(checkpoint).tensors.names()) == 21
