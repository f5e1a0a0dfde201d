"""Checkpoints made to harm: each is refused in one line that names the file, the tensor and the rule."""

from __future__ import annotations

import json
import os
import struct
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from tests.harness.patience import PATIENCE_S
from zoo.conversion.disk import files as files_module
from zoo.conversion.disk.directory import open_directory
from zoo.conversion.disk.files import copy_file
from zoo.conversion.disk.headers import read_header
from zoo.conversion.hf.converter import HfConverter
from zoo.conversion.transfer import open_checked, transfer
from zoo.core.errors import DataError, ZooError
from zoo.core.model import inventory
from zoo.core.model.rules import whole
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins


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
    last = max(tensors.names(), key=lambda name: tensors._places[name].start)
    with pytest.raises(DataError, match="changed since its header was checked"):
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
        (with_header({"a": ONE | {"shape": [int("9" * 4000)] * 8}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE | {"shape": [2**62, 0], "data_offsets": [0, 0]}}), "'a': shape"),
        (with_header({"a": ONE | {"shape": [2**33, 2**33, 2**33]}}, b"\0" * 8), "'a': shape"),
        (with_header({"a": ONE | {"shape": [1] * 9 + [2]}}, b"\0" * 8), "at most 8"),
        (with_header({"a": ONE | {"data_offsets": [0.0, 8.0]}}, b"\0" * 8), "'a': data_offsets"),
        (with_header({"a": ONE | {"data_offsets": [2**63, 2**63 + 8]}}, b"\0" * 8), "'a': data_offsets"),
        (with_header({"a": ONE | {"dtype": ["F32"]}}, b"\0" * 8), "unquantised"),
        (with_header({"a": ONE | {"more": 1}}, b"\0" * 8), "'a': must have"),
        (with_header({"a": ONE | {"data_offsets": [8, 0]}}, b"\0" * 8), "'a'"),
        (with_header({"a": ONE, "b": ONE}, b"\0" * 8), "overlaps"),
        (with_header({"a": ONE | {"data_offsets": [8, 16]}}, b"\0" * 16), "hole"),
        (with_header({f"t{i}": 0 for i in range(20_002)}), "20000"),
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
    with pytest.raises(DataError, match="a link out of its directory, to /dev/zero"):
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
        tensors = read_header(file).tensors
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


def test_a_snapshot_of_the_hub_cache_is_links_to_blobs(checkpoint, tmp_path):
    repo = tmp_path / "models--owner--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    snapshot = checkpoint.rename(repo / "snapshots" / "0123abc")
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    opened = open_directory(snapshot)
    assert len(opened.tensors.names()) == 21
    assert "tokenizer.json" in opened.files
    (repo / "secret").write_text("{}")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../secret")
    assert "tokenizer.json: a link out of its directory" in refusal(snapshot)


def test_a_directory_may_itself_be_a_link(checkpoint, tmp_path):
    (tmp_path / "latest").symlink_to("source")
    assert len(open_directory(tmp_path / "latest").tensors.names()) == 21
    (checkpoint / "LICENSE").symlink_to("tokenizer_config.json")
    assert "LICENSE" in open_directory(tmp_path / "latest").files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"])
def test_links_out_of_the_directory_are_not_followed(checkpoint, tmp_path, name):
    """A copy of such a checkpoint, pushed, would publish the file."""
    secret = tmp_path / "secret"
    if (checkpoint / name).exists():
        (checkpoint / name).rename(secret)
    else:
        secret.write_text("mine")
    (checkpoint / name).symlink_to(secret)
    message = refusal(checkpoint)
    assert f"{checkpoint / name}: a link out of its directory" in message
    assert str(secret) in message


def test_templates_with_a_name_stay_in_their_folder(checkpoint, tmp_path):
    folder, secret = checkpoint / "additional_chat_templates", tmp_path / "secret"
    secret.write_text("mine")
    folder.mkdir()
    (folder / "own.jinja").write_text("{{ messages }}")
    (folder / "alias.jinja").symlink_to("own.jinja")
    for name in (".hidden.jinja", "code.py", "a b.jinja", "deep"):
        (folder / name).mkdir() if name == "deep" else (folder / name).write_text("x")
    names = [name for name in open_directory(checkpoint).files if "/" in name]
    assert names == ["additional_chat_templates/alias.jinja", "additional_chat_templates/own.jinja"]
    (folder / "evil.jinja").symlink_to(secret)
    assert f"{folder / 'evil.jinja'}: a link out of its directory" in refusal(checkpoint)
    (folder / "evil.jinja").unlink()
    os.mkfifo(folder / "evil.jinja")
    assert "not a regular file" in refusal(checkpoint)
    (folder / "evil.jinja").unlink()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert f"{folder}: a link" in refusal(checkpoint)


@pytest.mark.parametrize("planted", ["folder", "link"])
def test_a_folder_of_templates_where_the_target_grows_is_written_anew(checkpoint, tmp_path, planted):
    victim, growing = tmp_path / "victim", tmp_path / ".out.unfinished"
    for folder in (checkpoint / "additional_chat_templates", victim, growing):
        folder.mkdir()
    (checkpoint / "additional_chat_templates/own.jinja").write_text("{{ messages }}")
    if planted == "link":
        (growing / "additional_chat_templates").symlink_to(victim)
    else:
        (growing / "additional_chat_templates").mkdir()
        (growing / "additional_chat_templates/left.jinja").write_text("left")
    opened = open_checked(str(checkpoint), Registry(Plugins.load()))
    transfer(opened, HfConverter(), tmp_path / "out")
    found = {path.name: path.read_text() for path in (tmp_path / "out/additional_chat_templates").iterdir()}
    assert found == {"own.jinja": "{{ messages }}"}
    assert not (tmp_path / "out/additional_chat_templates").is_symlink()
    assert not any(victim.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_pipes_directories_and_loops_do_not_hang(checkpoint, name):
    file = checkpoint / name
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    assert f"{file}: not a regular file" in refusal(checkpoint)
    file.unlink()
    file.mkdir()
    assert f"{file}: not a regular file" in refusal(checkpoint)
    file.rmdir()
    file.symlink_to(name)
    assert f"{file}: cannot be read" in refusal(checkpoint)


def test_a_pipe_that_takes_a_files_place_at_the_last_moment(checkpoint, monkeypatch):
    file = checkpoint / "config.json"
    status, lstat = os.lstat(file), os.lstat
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setattr(files_module.os, "lstat", lambda path: status if str(path) == str(file) else lstat(path))
    monkeypatch.setattr(files_module.os.path, "realpath", lambda path, **_: str(path))
    opened = threading.Thread(target=lambda: refusals.append(refusal(checkpoint)), daemon=True)
    refusals = []
    opened.start()
    opened.join(PATIENCE_S)
    assert refusals
    assert "not a regular file" in refusals[0]


def test_a_pipe_in_place_of_a_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard}: not a regular file" in refusal(sharded)


def test_a_tokenizer_file_of_absurd_size(checkpoint):
    with (checkpoint / "tokenizer.json").open("r+b") as file:
        file.truncate(257 << 20)
    assert "tokenizer.json: 269484032 bytes, more than" in refusal(checkpoint)


def test_a_file_that_changes_after_it_was_checked(checkpoint):
    file = checkpoint / "model.safetensors"
    for change in (lambda content: content, lambda content: content[:-1] + b"\1", lambda content: content[:3000]):
        content = file.read_bytes()
        tensors = open_directory(checkpoint).tensors
        file.unlink()
        file.write_bytes(change(content))  # the same name, another file
        with pytest.raises(DataError, match="model.safetensors: changed since its header was checked"):
            tensors.read("model.norm.weight", (slice(0, 32),))
        file.write_bytes(content)


def test_a_file_that_is_written_to_while_it_is_read(checkpoint):
    tensors = open_directory(checkpoint).tensors
    tensors.read("model.norm.weight", (slice(0, 32),))
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="model.safetensors: (became shorter|changed)"):
        tensors.read("model.norm.weight", (slice(0, 32),))


def test_a_template_is_bytes_and_nothing_else(checkpoint, tmp_path):
    template = b"{% for i in range(10**12) %}{{ ''.__class__.__mro__ }}{% endfor %}{{ unclosed"
    (checkpoint / "chat_template.jinja").write_bytes(template)
    registry = Registry(Plugins.load())
    transfer(open_checked(str(checkpoint), registry), HfConverter(), tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == template


def test_a_link_planted_in_the_target_is_not_followed(checkpoint, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to("target")
    opened = open_checked(str(checkpoint), Registry(Plugins.load()))
    with pytest.raises(DataError, match="choose another OUT"):
        transfer(opened, HfConverter(), tmp_path / "out")
    assert not any((tmp_path / "target").iterdir())
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "copy").symlink_to(victim)
    with pytest.raises(FileExistsError):
        copy_file(checkpoint / "tokenizer.json", tmp_path / "copy", limit=1 << 20)
    assert victim.read_text() == "untouched"


FIELDS = (
    [("num_hidden_layers", value) for value in (10**9, -1, 0, 1e3, "2", True, [2], int("9" * 4000))]
    + [("vocab_size", 2**40), ("hidden_size", 2**40), ("intermediate_size", 2**62), ("head_dim", 2**31)]
    + [("num_attention_heads", 10**9), ("num_key_value_heads", 0), ("max_position_embeddings", -5)]
    + [("rms_norm_eps", value) for value in (-1e-5, 2.0, "1e-5", [])]
    + [("rope_parameters", value) for value in ([], "llama3", {"rope_type": {}}, {"rope_type": "evil"})]
    + [("model_type", value) for value in ({}, [], 7, "", "a" * 65, "a\nb", "\x1b[2J")]
    + [("eos_token_id", list(range(300))), ("hidden_act", {"a": 1}), ("num_hidden_layers", 1000)]
)


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: repr(value)[:30])
def test_hostile_fields_are_refused_before_a_model_is_built(checkpoint, name, value, monkeypatch):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    monkeypatch.setattr(inventory, "meta_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ZooError) as error:
        open_checked(str(checkpoint), Registry(Plugins.load()))
    message = str(error.value)
    assert name in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"vocab_size": 5, "vocab_size": 6}', "'vocab_size' appears twice"),
        ('{"note": NaN}', "NaN"),
        ('{"note": -Infinity}', "Infinity"),
        ('{"note": 1e999}', "1e999"),
        ('{"note": ' + "1" * 5000 + "}", "digit"),
        ('{"note": "\\ud800"}', "surrogate"),
        ('{"note": ' + "[" * 17 + "]" * 17 + "}", "nested"),
        ('{"note": [' + ",".join(["[]"] * 10_001) + "]}", "more JSON than allowed"),
    ],
    ids=lambda value: value[:30],
)
def test_json_that_is_read_differently_elsewhere_or_cannot_be_written(checkpoint, text, word):
    file = checkpoint / "config.json"
    file.write_text(text)
    message = refusal(checkpoint)
    assert message.startswith(f"{file}:")
    assert word in message


def test_an_index_that_names_a_tensor_twice(sharded):
    file = sharded / "model.safetensors.index.json"
    text = file.read_text()
    line = next(line for line in text.splitlines() if "model.norm.weight" in line)
    file.write_text(text.replace(line, f"{line.rstrip(',')},\n{line}"))
    assert "'model.norm.weight' appears twice" in refusal(sharded)


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "\x1b[31m", "a\x00", "a" * 257, "\u00e9"], ids=repr)
def test_names_that_could_fool_a_terminal_or_a_regex(tmp_path, sharded, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_header({name: ONE}, b"\0" * 8))
    with pytest.raises(DataError, match="a name must be 1 to 256 printable") as error:
        read_header(file)
    assert str(error.value).isprintable()
    edit_index(sharded, lambda weight_map: weight_map.update({name: "model.safetensors"}))
    assert "a name must be 1 to 256 printable" in refusal(sharded)


def test_an_index_of_too_many_shards(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({f"t{i}": f"s{i}.safetensors" for i in range(3000)}))
    assert "2000 are allowed" in refusal(sharded)


def test_a_tied_copy_without_its_original(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(DataError, match="embed_tokens.weight is there under its second name only, lm_head.weight"):
        open_checked(str(checkpoint), Registry(Plugins.load()))


def test_links_planted_where_the_target_grows_are_not_followed(checkpoint, tmp_path):
    opened = open_checked(str(checkpoint), Registry(Plugins.load()))
    victim, growing = tmp_path / "victim", tmp_path / ".out.unfinished"
    victim.write_text("untouched")
    growing.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        (growing / name).symlink_to(victim)
    transfer(opened, HfConverter(), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (tmp_path / ".two.unfinished").symlink_to(checkpoint)
    with pytest.raises(DataError, match=r"two\.unfinished is a link"):
        transfer(opened, HfConverter(), tmp_path / "two")
    assert victim.read_text() == "untouched"
