"""Out to the hub's form and back: the same bits, the same config, nothing missing, nothing half written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conversion.conftest import save_model
from tools.reference import ROPES
from zoo.conversion.disk import stream, writer
from zoo.conversion.disk.directory import CONFIG, open_directory
from zoo.conversion.disk.writer import Outgoing, plan_shards
from zoo.conversion.hf.converter import HfConverter
from zoo.core.errors import DataError
from zoo.core.model.inventory import expected_tensors
from zoo.core.model.load import ModuleSource, load_into
from zoo.models.llama3.model import SPEC


def load_ours(directory) -> torch.nn.Module:
    opened = open_directory(directory)
    model = SPEC.build(SPEC.parse(opened.config))
    load_into(model, opened.tensors, SPEC.rules(None))
    return model


def export(model, source, out, *, dtype=None, shard_bytes=None):
    opened = open_directory(source)
    files = {name: source / name for name in (*opened.files, CONFIG)}
    config, tensors = SPEC.parse(opened.config), ModuleSource(model)
    HfConverter().export(SPEC, config, tensors, out, files=files, dtype=dtype, shard_bytes=shard_bytes)


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ROPES)
def test_round_trip_bit_for_bit(tmp_path, rope, tied):
    rope = ROPES[rope] | {"rope_theta": 5e5}
    source = save_model(tmp_path / "source", rope_parameters=rope, tie_word_embeddings=tied, attention_bias=tied)
    out = tmp_path / "out"
    export(load_ours(source), source, out)

    before, (after, report) = (
        AutoModelForCausalLM.from_pretrained(source),
        AutoModelForCausalLM.from_pretrained(out, output_loading_info=True),
    )
    assert not any(report.values()), report
    stored = tensors_of(source), tensors_of(out)
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        for parameter in (*before.parameters(), *after.parameters()):
            # Where in a file a tensor lay may decide in which order its numbers are added.
            parameter.data = parameter.clone()
        assert torch.equal(before(tokens).logits, after(tokens).logits)

    configs = [AutoConfig.from_pretrained(directory).to_dict() for directory in (source, out)]
    differing = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert differing <= {"_name_or_path", "torch_dtype"}


def test_files_are_copied_byte_for_byte(checkpoint, tmp_path):
    out = tmp_path / "out"
    (checkpoint / "LICENSE.txt").write_bytes(b"terms\r\n")
    (checkpoint / "modeling_evil.py").write_text("raise SystemExit")
    export(load_ours(checkpoint), checkpoint, out)
    copied = {path.name for path in out.iterdir()}
    assert copied == {path.name for path in checkpoint.iterdir()} - {"modeling_evil.py"} | {"zoo-checksums.txt"}
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"


def test_the_source_config_keeps_what_the_family_does_not_know(checkpoint, tmp_path):
    file = checkpoint / "config.json"
    more = {
        "my_note": [1, 2],
        "auto_map": {"AutoModel": "x.Y"},
        "_name_or_path": "/somewhere",
        "torch_dtype": "float64",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    export(load_ours(checkpoint), checkpoint, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["my_note"] == [1, 2]
    assert not {"auto_map", "_name_or_path"} & written.keys()
    assert written["dtype"] == written["torch_dtype"] == "float32"


def test_generation_config_is_made_where_there_is_none(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    export(load_ours(checkpoint), checkpoint, tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"_from_model_config": True, "bos_token_id": 257, "eos_token_id": [257, 258]}


def test_shards_and_their_index(checkpoint, tmp_path):
    out = tmp_path / "out"
    export(load_ours(checkpoint), checkpoint, out, shard_bytes=20_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) >= 4
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = tensors_of(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    after, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, tensors_of(checkpoint)[name]) for name, tensor in tensors.items())


def test_shards_are_filled_in_order_and_never_split_a_tensor():
    tensors = [Outgoing(str(i), (size,), "float32") for i, size in enumerate([3, 3, 9, 1, 1, 1])]
    assert [[int(t.name) for t in shard.tensors] for shard in plan_shards(tensors, 24)] == [[0, 1], [2], [3, 4, 5]]


def test_every_tensor_is_aligned_and_the_metadata_says_pt(checkpoint, tmp_path):
    export(load_ours(checkpoint), checkpoint, tmp_path / "out", dtype="bfloat16")
    content = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % 2 == 0 for entry in header.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_export_in_another_dtype(checkpoint, tmp_path, dtype):
    out = tmp_path / "out"
    export(load_ours(checkpoint), checkpoint, out, dtype=dtype)
    source, written = tensors_of(checkpoint), tensors_of(out)
    target = getattr(torch, dtype)
    assert all(torch.equal(written[name], tensor.to(target)) for name, tensor in source.items())
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype is target


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    source = save_model(tmp_path / "source", dtype=torch.bfloat16)
    model = load_ours(source).bfloat16()
    export(model, source, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_an_overflow_is_an_error_that_names_the_tensor(checkpoint, tmp_path):
    model = load_ours(checkpoint)
    with torch.no_grad():
        model.model.layers["1"].mlp.up_proj.weight[3, 4] = 70_000.0
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has a value of 70000.*--dtype"):
        export(model, checkpoint, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(model, checkpoint, tmp_path / "out", dtype="bfloat16")


def test_nothing_is_overwritten(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "note").write_text("mine")
    model = load_ours(checkpoint)
    with pytest.raises(DataError, match="not empty, and nothing is overwritten"):
        export(model, checkpoint, out)
    (out / "note").unlink()
    export(model, checkpoint, out)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no directory"):
        export(model, checkpoint, link)


def left_behind(tmp_path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name not in ("source", "out")]


def test_bytes_that_read_back_differently_are_found(checkpoint, tmp_path, monkeypatch):
    model, write_all = load_ours(checkpoint), stream._write_all

    def flip(descriptor, data, offset):
        write_all(descriptor, data, offset)
        if offset > 20_000:
            os.pwrite(descriptor, bytes([data[0] ^ 1]), offset)

    monkeypatch.setattr(stream, "_write_all", flip)
    with pytest.raises(DataError, match="reads back differently"):
        export(model, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert left_behind(tmp_path) == []


def test_files_cannot_lead_out_of_the_target(checkpoint, tmp_path):
    model, files = load_ours(checkpoint), {"../outside": checkpoint / "config.json"}
    config = SPEC.parse(open_directory(checkpoint).config)
    with pytest.raises(DataError, match="plain name"):
        HfConverter().export(SPEC, config, ModuleSource(model), tmp_path / "out", files=files, dtype=None)
    assert not (tmp_path / "outside").exists()


def test_only_a_block_of_a_tensor_is_held(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 400)
    model, reads = load_ours(checkpoint), []

    class Spy(ModuleSource):
        def read(self, name, index, buffer=None):
            reads.append(super().read(name, index).numel())
            return super().read(name, index)

    config = SPEC.parse(open_directory(checkpoint).config)
    HfConverter().export(SPEC, config, Spy(model), tmp_path / "out", files={}, dtype=None)
    assert max(reads) <= 100
    assert all(torch.equal(t, tensors_of(checkpoint)[n]) for n, t in tensors_of(tmp_path / "out").items())


@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_those_of_transformers(tmp_path, tied):
    source = save_model(tmp_path / "source", tie_word_embeddings=tied, mlp_bias=True)
    opened = open_directory(source)
    expected = expected_tensors(SPEC, SPEC.parse(opened.config))
    assert expected == {name: opened.tensors.shape(name) for name in opened.tensors.names()}
