"""Small checkpoints and ways to break them, for tools/fuzz_conversion.py. All of it follows from a seed."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from zoo.core.contracts.entries import ModelEntry
from zoo.core.contracts.models import ModelSpec
from zoo.core.model.inventory import expected_tensors
from zoo.core.registry.decisions import Registry

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Files = dict[str, bytes]

_SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 4,
}
_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 16, 255, 256, 2000, 10**5, 2**31 - 1, 2**31, 2**32, 2**48, 2**53, 2**62, 2**63, 2**64]
_NUMBERS += [-(2**63), 10**9, 10**30, 10**4000]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-5, -1e-5, 1e-320, 1e308, -1e308, 2.0**53]
_TEXTS = [
    "",
    "a",
    "F32",
    "BF16",
    "I8",
    "F8_E4M3",
    "llama",
    "nan",
    "\n",
    "\x1b[2J",
    "\x00",
    "\ud800",
    "\u2028",
    "../x",
    "é",
]
_TEXTS += ["x" * 300, "x" * 70_000, "{", "%s%n", "{0.__class__}", "true", "model.layers.99999999999.mlp.weight"]
_NAMES = [
    "../out.safetensors",
    "/etc/passwd",
    "C:\\x.safetensors",
    "..\\x.safetensors",
    "a/b.safetensors",
    ".safetensors",
]
_NAMES += [
    "x.safetensors\n",
    "x\x00.safetensors",
    "pytorch_model.bin",
    "x" * 300 + ".safetensors",
    "absent.safetensors",
]
_NAMES += ["config.json", "model.safetensors", "~/x.safetensors", "x.SAFETENSORS", "\u202e.safetensors"]
_RAW = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b'"\\ud800"',
    b"\xff\xfe",
    b"1.0",
    b"1e3",
]
_RAW += [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"//",
    b'"',
    b"\\",
    b"\x00",
    b",",
    b"00",
    b"- 1",
    b'{"a":1,"a":2}',
    b"[[],[],[[]]]",
]


@dataclass
class Case:
    """A checkpoint about to be written: contents, and what stands in place of some files."""

    files: Files
    links: dict[str, str] = field(default_factory=dict)
    pipes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    """Files that are cut, or stretched without being written."""

    def write(self, directory: Path) -> None:
        directory.mkdir()
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        for name in [*self.links, *self.pipes, *self.folders]:
            (directory / name).unlink(missing_ok=True)
        for name, target in self.links.items():
            (directory / name).symlink_to(target)
        for name in self.pipes:
            os.mkfifo(directory / name)
        for name in self.folders:
            (directory / name).mkdir()
        for name, length in self.lengths.items():
            os.truncate(directory / name, length)


def bases(registry: Registry) -> list[tuple[str, Files]]:
    """A small whole checkpoint of every family: one file, shards, and tied where the family can."""
    found = []
    for name in registry.models.names():
        entry, spec = registry.models.get(name), registry.models.load(name)
        for form, tied in (("single", False), ("sharded", False), ("single", True)):
            fields = _small_fields(entry, spec, tied=tied)
            found.append((f"{name}/{form}{'/tied' if tied else ''}", _files(spec, fields, sharded=form == "sharded")))
    return found


def _small_fields(entry: ModelEntry, spec: ModelSpec, *, tied: bool) -> dict[str, Any]:
    known = spec.hub_config(spec.parse(next(iter(entry.sizes.values()))))
    over = {key: value for key, value in (_SMALL | {"tie_word_embeddings": tied}).items() if key in known}
    # What is said layer by layer gets shorter with them.
    layers = known["num_hidden_layers"]
    over |= {
        key: value[: over["num_hidden_layers"]]
        for key, value in known.items()
        if isinstance(value, list) and len(value) == layers and key != "eos_token_id"
    }
    return dict(spec.override(known, over))


def _files(spec: ModelSpec, fields: Mapping[str, Any], *, sharded: bool) -> Files:
    shapes = expected_tensors(spec, spec.parse(fields))
    noise = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=noise).bfloat16() for name, shape in shapes.items()}
    files = {CONFIG: json.dumps(fields).encode(), "tokenizer.json": b'{"a": 1}', "chat_template.jinja": b"{{ 1/0 }}"}
    if not sharded:
        return files | {SINGLE: save(tensors, {"format": "pt"})}
    shards = [dict(list(tensors.items())[i::3]) for i in range(3)]
    names = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    files |= {name: save(shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)}
    return files | {INDEX: json.dumps(index).encode()}


def mutate(draw: random.Random, files: Files, kind: str) -> Case:
    """One to three changes of a kind: header, index, config or file."""
    case = Case(dict(files))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        _KINDS[kind](draw, case)
    return case


def _header(draw: random.Random, case: Case) -> None:
    name = draw.choice([name for name in case.files if name.endswith(".safetensors")])
    content = case.files[name]
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    choice = draw.random()
    if choice < 0.08:
        claimed = draw.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 16 << 20])
        case.files[name] = struct.pack("<Q", min(max(claimed, 0), 2**64 - 1)) + text + data
        return
    if choice < 0.14:
        case.files[name] = _flipped(draw, content, draw.choice([8, length, len(content)]))
        return
    if choice < 0.17:
        case.lengths[name] = draw.randrange(len(content) + 100)
        return
    text = _raw(draw, text) if choice < 0.35 else _edited(draw, text, _header_fields)
    data += bytes(draw.choice([0, 0, 0, 1, 8, 512]))
    case.files[name] = struct.pack("<Q", len(text)) + text + data


def _header_fields(draw: random.Random, fields: dict[str, Any]) -> None:
    names = [name for name in fields if name != "__metadata__"]
    if not names:
        return
    name = draw.choice(names)
    entry = fields[name]
    what = draw.randrange(11)
    if what == 0:
        del fields[name]
    elif what == 1:
        fields[draw.choice([*_TEXTS, *_NAMES, name + ".bias", draw.choice(names)])] = fields.pop(name)
    elif what == 2:
        fields[draw.choice([*_TEXTS, name + "2", "model.layers.0.self_attn.rotary_emb.inv_freq"])] = _tensor(draw)
    elif what == 3:
        fields["__metadata__"] = draw.choice([None, [], {}, {"a": 1}, {"a": "b"}, {"format": "tf"}, "x", _value(draw)])
    elif what == 4:
        fields[name] = _value(draw)
    elif not isinstance(entry, dict):
        fields[name] = _tensor(draw)
    elif what == 5:
        entry["dtype"] = draw.choice(
            ["F32", "F16", "BF16", "F64", "I64", "I8", "U8", "F4", "F8_E8M0", "BOOL", _value(draw)]
        )
    elif what in (6, 7):
        entry["shape"] = _integers(draw, entry.get("shape"))
    elif what in (8, 9):
        entry["data_offsets"] = _integers(draw, entry.get("data_offsets"))
    else:
        entry.pop(draw.choice(list(entry)), None) if draw.random() < 0.5 and entry else entry.update(more=_value(draw))


def _tensor(draw: random.Random) -> dict[str, Any]:
    shape = draw.choice([[], [0], [1], [2**62, 0], [2**32, 2**32], [4, 4], [1] * 9, _integers(draw, [1, 2])])
    return {"dtype": draw.choice(["F32", "BF16", "I8"]), "shape": shape, "data_offsets": _integers(draw, [0, 0])}


def _integers(draw: random.Random, old: Any) -> Any:
    """A list like the old one, with something strange in it, or no list."""
    if not isinstance(old, list) or draw.random() < 0.1:
        return _value(draw)
    new = list(old)
    for _ in range(draw.choice([1, 1, 2])):
        if new and draw.random() < 0.8:
            at = draw.randrange(len(new))
            near = [new[at] + 1, new[at] - 1, new[at] * 2] if isinstance(new[at], int) else []
            new[at] = draw.choice([*near, draw.choice(_NUMBERS), draw.choice(_NUMBERS), _value(draw)])
        else:
            new.insert(draw.randrange(len(new) + 1), draw.choice(_NUMBERS))
    draw.random() < 0.1 and draw.shuffle(new)
    return new


def _index(draw: random.Random, case: Case) -> None:
    text = case.files[INDEX]
    choice = draw.random()
    if choice < 0.1:
        case.files[INDEX] = _flipped(draw, text, len(text))
    elif choice < 0.35:
        case.files[INDEX] = _raw(draw, text)
    else:
        case.files[INDEX] = _edited(draw, text, _index_fields)


def _index_fields(draw: random.Random, index: dict[str, Any]) -> None:
    weight_map = index.get("weight_map")
    what = draw.randrange(8)
    if what == 0 or not isinstance(weight_map, dict) or not weight_map:
        index[draw.choice(["weight_map", "metadata", "more"])] = _value(draw)
        return
    name = draw.choice(list(weight_map))
    if what == 1:
        del weight_map[name]
    elif what == 2:
        weight_map[draw.choice([*_TEXTS, name + ".bias"])] = weight_map.pop(name)
    elif what == 3:
        weight_map[draw.choice([*_TEXTS, name + "2"])] = draw.choice(list(weight_map.values()))
    elif what == 4:
        weight_map[name] = draw.choice(list(weight_map.values()))
    elif what == 5:
        weight_map[name] = _value(draw)
    else:
        weight_map[name] = draw.choice(_NAMES)


def _config(draw: random.Random, case: Case) -> None:
    text = case.files[CONFIG]
    choice = draw.random()
    if choice < 0.08:
        case.files[CONFIG] = _flipped(draw, text, len(text))
    elif choice < 0.2:
        case.files[CONFIG] = _raw(draw, text)
    else:
        case.files[CONFIG] = _edited(draw, text, _config_fields)


def _config_fields(draw: random.Random, fields: dict[str, Any]) -> None:
    if not fields:
        return
    name = draw.choice(list(fields))
    what = draw.randrange(10)
    if what == 0:
        del fields[name]
    elif what == 1:
        fields[draw.choice([*_TEXTS, "auto_map", "quantization_config", "layer_types", "sliding_window"])] = _value(
            draw
        )
    elif what in (2, 3) and isinstance(fields.get("rope_parameters"), dict):
        place = fields[draw.choice(["rope_parameters", "rope_parameters", "rope_scaling"])] = dict(
            fields["rope_parameters"]
        )
        key = draw.choice(
            ["rope_type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta", "beta_fast", "type"]
        )
        place["rope_type"] = draw.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
        place[key] = _value(draw)
    elif what in (4, 5) and isinstance(fields[name], int | float):
        fields[name] = draw.choice([fields[name] + 1, fields[name] * 2, fields[name] // 2, -fields[name], *_NUMBERS])
    else:
        fields[name] = _value(draw)


def _file(draw: random.Random, case: Case) -> None:
    name = draw.choice([*case.files, "LICENSE", INDEX, SINGLE, "generation_config.json"])
    what = draw.randrange(6)
    if what == 0:
        outside = ["../secret", "/dev/zero", "/dev/stdin", "/proc/self/environ", "../../secret", "."]
        case.links[name] = draw.choice([*outside, name, CONFIG, "absent"])
    elif what == 1:
        case.pipes.append(name) if name not in case.pipes else None
    elif what == 2:
        case.folders.append(name) if name not in case.folders else None
    elif what == 3:
        case.files.pop(name, None)
    elif what == 4 and name in case.files:
        case.lengths[name] = draw.choice([0, 1, 7, 8, 1 << 20, 11 << 20, 1 << 34, 1 << 40])
    else:
        case.files[name] = draw.choice([b"", b"\x80\x04N.", b"{}", bytes(draw.randrange(4000))])
    _settle(case)


def _settle(case: Case) -> None:
    """One thing in each place."""
    for place in (case.links, case.pipes, case.folders):
        for name in [name for name in place if name in case.lengths]:
            del case.lengths[name]
    case.pipes = [name for name in case.pipes if name not in case.links]
    case.folders = [name for name in case.folders if name not in case.links and name not in case.pipes]
    case.lengths = {name: length for name, length in case.lengths.items() if name in case.files}


_KINDS: Mapping[str, Callable[[random.Random, Case], None]] = {
    "header": _header,
    "index": _index,
    "config": _config,
    "file": _file,
}


def _edited(draw: random.Random, text: bytes, change: Callable[[random.Random, dict[str, Any]], None]) -> bytes:
    """The JSON with a field changed; as it is if it is no JSON any more."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(fields, dict):
        return text
    change(draw, fields)
    return json.dumps(fields, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _raw(draw: random.Random, text: bytes) -> bytes:
    """Bytes put in, cut out, doubled; rarely a bomb."""
    at = draw.randrange(len(text) + 1)
    what = draw.randrange(6)
    if what == 0:
        return text[:at]
    if what == 1:
        end = min(len(text), at + draw.randrange(200))
        return text[:end] + text[at:end] + text[end:]
    if what == 2:
        return _bomb(draw) if draw.random() < 0.1 else draw.choice(_RAW)
    if what == 3:
        # In place of a value, where it does most.
        spots = [i + 1 for i, byte in enumerate(text) if byte in b":[,"]
        at = draw.choice(spots) if spots else at
        end = next((i for i in range(at, len(text)) if text[i] in b",]}"), at)
        return text[:at] + draw.choice(_RAW) + text[end:]
    return text[:at] + draw.choice(_RAW) + text[at:]


def _bomb(draw: random.Random) -> bytes:
    size = draw.choice([1 << 16, 1 << 19, 1 << 21])
    unit = draw.choice([b"[],", b"{},", b"0,", b'"",', b"[", b'{"a":', b"[[[[]]]],", b"1.5,", b" "])
    body = unit * (size // len(unit))
    return draw.choice([b'{"weight_map":[%s0]}', b'{"a":[%s0]}', b"[%s0]", b'{"a":"%s"}']) % body


def _flipped(draw: random.Random, content: bytes, limit: int) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        if limit:
            changed[draw.randrange(min(limit, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def _value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    what = draw.randrange(12)
    if what < 4:
        return draw.choice(_NUMBERS)
    if what < 6:
        return draw.choice(_FLOATS)
    if what < 8:
        return draw.choice(_TEXTS)
    if what == 8:
        return draw.choice([True, False, None])
    if what == 9:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))] if depth < 4 else []
    if what == 10:
        return {draw.choice(_TEXTS): _value(draw, depth + 1) for _ in range(draw.randrange(3))} if depth < 4 else {}
    return _nested(draw.choice([5, 15, 17, 50, 500]))


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value
