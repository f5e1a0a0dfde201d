"""Checkpoints at the limits of what is allowed, and far beyond, for tools/fuzz_conversion.py."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from tools.fuzz_cases import CONFIG, INDEX, SINGLE, Case, Files


def extremes(single: Files) -> Iterator[tuple[str, Case]]:
    """Each with a name, made from a whole checkpoint of one file."""
    for name, content in _headers():
        yield name, Case({**single, SINGLE: content})
    for name, text in _texts(1 << 20):
        yield f"config of {name}", Case({**single, CONFIG: text})
    rest = {name: content for name, content in single.items() if name != SINGLE}
    for name, text in _texts(10 << 20):
        yield f"index of {name}", Case({**rest, INDEX: text})
    yield "index of 80,000 tensors", Case({**rest, INDEX: _index(80_000, 1)})
    yield "index of 2,000 shards", Case({**rest, INDEX: _index(2000, 2000), **dict(_shards(2000))})
    yield "index of 80,000 tensors in 4 files", Case({**rest, INDEX: _index(80_000, 4), **dict(_shards(4, 20_000))})
    yield "index of 60,000 shards", Case({**rest, INDEX: _index(60_000, 60_000)})
    for name in (CONFIG, SINGLE, "tokenizer.json", "chat_template.jinja"):
        yield f"{name} of 16 TiB that is not there", Case(dict(single), lengths={name: 1 << 43})


def large_models(single: Files) -> Iterator[tuple[str, Case]]:
    """What a config may ask for at most, of a checkpoint that has as many tensors, but not those."""
    config = json.loads(single[CONFIG])
    many = _header(_tensors(12_288, "model.layers.{}.x"))
    asked: list[dict[str, int]] = [{"num_hidden_layers": 512}, {"num_hidden_layers": 1024}]
    asked += [{"vocab_size": 1 << 22, "hidden_size": 1 << 17, "num_attention_heads": 1 << 10, "head_dim": 128}]
    if "num_local_experts" in config:
        asked += [{"num_hidden_layers": n, "num_local_experts": 1024} for n in (32, 1024)]
    for fields in asked:
        name = ", ".join(f"{key} {value}" for key, value in fields.items())
        yield name, Case({**single, CONFIG: json.dumps(config | fields).encode(), SINGLE: many})


def _headers() -> Iterator[tuple[str, bytes]]:
    yield "header of 20,000 tensors", _header(_tensors(20_000, "model.layers.{}.block_sparse_moe.experts.0.w1.weight"))
    yield "header of 20,000 long names", _header(_tensors(20_000, "x" * 200 + "{}"))
    yield "header of 20,002 tensors", _header(_tensors(20_002, "{}"))
    yield (
        "header of 8 dims each",
        _header({f"t{i}": {"dtype": "F32", "shape": [0] * 8, "data_offsets": [0, 0]} for i in range(20_000)}),
    )
    yield "header of metadata", _header({"__metadata__": {str(i): "" for i in range(600_000)}})
    for name, text in _texts(8 << 20):
        yield f"header of {name}", struct.pack("<Q", len(text)) + text
    yield "header of 9 MiB", struct.pack("<Q", 9 << 20) + b" " * (9 << 20)


def _texts(size: int) -> Iterator[tuple[str, bytes]]:
    """JSON of just so many bytes that takes the most memory or time."""
    for name, start, unit, end in (
        ("lists", b'{"a":[', b"[],", b"0]}"),
        ("objects", b'{"a":[', b"{},", b"0]}"),
        ("numbers", b'{"a":[', b"0,", b"0]}"),
        ("floats", b'{"a":[', b"1.5,", b"0]}"),
        ("long numbers", b'{"a":[', b"1" * 4000 + b",", b"0]}"),
        ("fractions", b'{"a":[', b"0." + b"1" * 4000 + b",", b"0]}"),
        ("one string", b'{"a":"', b"x", b'"}'),
        ("escapes", b'{"a":"', b"\\u1234", b'"}'),
        ("nesting", b"", b"[", b""),
        ("spaces", b"{", b" ", b"}"),
        ("one name twice", b'{"a":0,', b" ", b'"a":0}'),
        ("one name often", b"{", b'"a":0,', b'"a":0}'),
    ):
        yield name, start + unit * ((size - len(start) - len(end)) // len(unit)) + end
    names = ",".join(f'"{i}":0' for i in range(size // 12))
    yield "names", f"{{{names}}}".encode()


def _tensors(count: int, name: str) -> dict[str, object]:
    return {name.format(i): {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(count)}


def _header(fields: dict[str, object]) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode()
    ends = [entry["data_offsets"][1] for name, entry in fields.items() if name != "__metadata__"]  # type: ignore[index]
    return struct.pack("<Q", len(text)) + text + bytes(max(ends, default=0))


def _index(tensors: int, shards: int) -> bytes:
    weight_map = {f"t{i}": f"s{i % shards}.safetensors" for i in range(tensors)}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def _shards(count: int, each: int = 1) -> Iterator[tuple[str, bytes]]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for i in range(count):
        yield f"s{i}.safetensors", _header({f"t{i + count * j}": empty for j in range(each)})
