"""Every family that is registered, in every form it is found in: round trips bit for bit, damage refused by name."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.conversion.hf.converter import CONVERTER
from zoo.conversion.transfer import open_checked, transfer
from zoo.core.errors import DataError
from zoo.core.model.load import ModuleSource, load_into
from zoo.core.model.rules import RuleBook, whole
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

REGISTRY = Registry(Plugins.load())
FAMILIES = [name for name in REGISTRY.models.names() if "tiny" in REGISTRY.models.get(name).sizes]


@cache
def tiny(family):
    """Spec, config and a model in bfloat16 of the family's smallest size."""
    spec = REGISTRY.models.load(family)
    config = spec.parse(REGISTRY.models.get(family).sizes["tiny"])
    torch.manual_seed(0)
    return spec, config, spec.build(config).bfloat16()


def forms(family):
    spec, config, _ = tiny(family)
    return [spec.rules(config), *spec.forms(config)]


CASES = [(family, form) for family in FAMILIES for form in range(len(forms(family)))]


@cache
def stored(family, form):
    """The model's tensors as that form names and cuts them."""
    model = tiny(family)[2]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    book = RuleBook(forms(family)[form], shapes)
    source = book.to_hub(ModuleSource(model))
    return {name: source.read(name, whole(shape)).contiguous() for name, shape in book.hub_shapes.items()}


def write(directory, family, tensors):
    spec, config, _ = tiny(family)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(spec.hub_config(config)))
    return directory


def convert(source, out, **options):
    transfer(open_checked(str(source), REGISTRY), CONVERTER, out, **options)
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_families_with_several_forms_are_among_them():
    assert {"llama3", "mixtral", "nemotron"} <= set(FAMILIES)
    assert ("mixtral", 1) in CASES


@pytest.mark.parametrize(("family", "form"), CASES)
def test_round_trip_bit_for_bit(tmp_path, family, form):
    spec, config, model = tiny(family)
    written = convert(write(tmp_path / "source", family, stored(family, form)), tmp_path / "out")
    canonical = stored(family, 0)
    assert written.keys() == canonical.keys()
    assert all(torch.equal(tensor, canonical[name]) for name, tensor in written.items())

    again = convert(tmp_path / "out", tmp_path / "again", shard_size="500KB")
    assert all(torch.equal(tensor, canonical[name]) for name, tensor in again.items())
    assert again.keys() == canonical.keys()

    opened = open_checked(str(tmp_path / "again"), REGISTRY)
    loaded = spec.build(config).bfloat16()
    load_into(loaded, opened.tensors, ())
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())


def delete(tensors, name, _directory):
    del tensors[name]
    return "lacks"


def add(tensors, name, _directory):
    tensors[f"{name}_more"] = tensors[name].clone()
    return "has"


def rename(tensors, name, _directory):
    tensors[f"{name}s"] = tensors.pop(name)
    return "lacks"


def duplicate(tensors, name, directory):
    save_file({name: tensors[name]}, directory / "b.safetensors", metadata={"format": "pt"})
    save_file(tensors, directory / "a.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors") | {name: "b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return "as well as in"


def truncate(tensors, name, _directory):
    tensors[name] = tensors[name][:-1].contiguous()
    return "and not"


def retype(tensors, name, _directory):
    tensors[name] = tensors[name].float()
    return "float32, and most tensors are bfloat16"


def make_whole_numbers(tensors, name, _directory):
    tensors[name] = tensors[name].to(torch.int16)
    return "stored as 'I16'"


@pytest.mark.parametrize("damage", [delete, add, rename, duplicate, truncate, retype, make_whole_numbers])
@pytest.mark.parametrize(("family", "form"), CASES)
def test_damage_to_a_tensor_of_any_kind_is_refused(tmp_path, family, form, damage):
    tensors = stored(family, form)
    kinds = {re.sub(r"\.\d+", ".*", name): name for name in tensors}
    for number, name in enumerate(kinds.values()):
        changed = dict(tensors)
        directory = tmp_path / str(number)
        directory.mkdir()
        words = damage(changed, name, directory)
        write(directory, family, changed)
        if damage is duplicate:
            (directory / "model.safetensors").unlink()
        with pytest.raises(DataError) as error:
            convert(directory, tmp_path / "out")
        assert words in str(error.value), (name, str(error.value))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir() if not path.name.isdigit()] == []


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_file_cut_within_any_tensor_is_refused(tmp_path, family, form):
    directory = write(tmp_path / "source", family, stored(family, form))
    file = directory / "model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    base = 8 + int.from_bytes(content[:8], "little")
    ends = {re.sub(r"\.\d+", ".*", n): entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"}
    for end in ends.values():
        file.write_bytes(content[: base + end - 1])
        with pytest.raises(DataError, match="truncated"):
            convert(directory, tmp_path / "out")


def test_types_may_differ_where_that_is_said(tmp_path):
    tensors = dict(stored("mixtral", 1))
    odd = next(name for name in tensors if name.endswith("gate_up_proj"))
    tensors[odd] = tensors[odd].float() / 3
    source = write(tmp_path / "source", "mixtral", tensors)
    kept = convert(source, tmp_path / "stored", dtype="stored")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16, torch.float32}
    alike = convert(source, tmp_path / "bfloat16", dtype="bfloat16")
    assert all(torch.equal(tensor, kept[name].bfloat16()) for name, tensor in alike.items())
