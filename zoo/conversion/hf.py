"""The Hugging Face checkpoint directory as a format: found, opened, written and verified."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from zoo.conversion.directory import (
    CONFIG,
    GENERATION,
    MAX_COMPANION,
    looks_like_checkpoint,
    open_directory,
    read_object,
)
from zoo.conversion.files import copy_file
from zoo.conversion.headers import BYTES
from zoo.conversion.hub import fetch, is_hub_id
from zoo.conversion.writer import Outgoing, raw_bytes, write_json, write_tensors
from zoo.core.contracts import HubCheckpoint, ModelSpec, TensorSource
from zoo.core.errors import DataError
from zoo.core.rules import row_blocks, whole
from zoo.core.weights import check_tensors, rule_book

SHARD_BYTES = 5_000_000_000
"""The hub's own limit, in decimal gigabytes."""

_BLOCK_VALUES = 1 << 22
_MAX_CONFIG = 1 << 20
_DROPPED = ("auto_map", "_name_or_path", "quantization_config")


class HfConverter:
    """config.json, safetensors, tokenizer files: what transformers, vLLM and the hub read."""

    name: ClassVar[str] = "hf"

    def __init__(self, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.shard_bytes = shard_bytes

    def locate(self, source: str) -> Path | None:
        """A directory with such a checkpoint, or the copy of a hub id (`owner/name`). Raises DataError."""
        path = Path(source).expanduser()
        if path.exists():
            return path if looks_like_checkpoint(path) else None
        return fetch(source) if is_hub_id(source) else None

    def open(self, path: Path) -> HubCheckpoint:
        """Check a directory; nothing in it is run, no tensor is read. Raises DataError naming file, tensor and rule."""
        return open_directory(path)

    def export(
        self,
        spec: ModelSpec,
        config: Any,
        tensors: TensorSource,
        out: Path,
        *,
        files: Mapping[str, Path],
        dtype: str | None,
    ) -> None:
        """Write `out` whole or not at all, then read it back and compare every byte. Raises DataError.

        `tensors` are under the family's own names. `files` are copied byte for byte, except that a `config.json`
        among them is the base over which the family's fields are laid.
        """
        _check_target(out)
        book = rule_book(spec, config)
        check_tensors(tensors, book.shapes)
        source = book.to_hub(tensors)
        outgoing = [Outgoing(n, shape, dtype or source.dtype(n)) for n, shape in book.hub_shapes.items()]
        with _unfinished(out) as directory:
            checksums = write_tensors(directory, source, outgoing, shard_bytes=self.shard_bytes)
            _copy(files, directory)
            fields = _config(spec.hub_config(config), files.get(CONFIG), outgoing)
            write_json(directory / CONFIG, fields)
            if GENERATION not in files:
                write_json(directory / GENERATION, _generation(fields))
            _verify(directory, outgoing, checksums)


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} exists and is no directory; choose another OUT")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, and nothing is overwritten; choose another OUT or remove it")


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` if all goes well, and vanishes otherwise."""
    directory = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        yield directory
        _sync(directory)
        directory.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}; nothing was left behind, choose another OUT"
        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(files: Mapping[str, Path], directory: Path) -> None:
    for name, path in files.items():
        if name == CONFIG:
            continue
        if Path(name).name != name or (directory / name).exists():
            raise DataError(f"{name!r} cannot be copied into a checkpoint: it must be a plain name not used yet")
        copy_file(path, directory / name, limit=MAX_COMPANION)


def _config(fields: Mapping[str, Any], base: Path | None, outgoing: Sequence[Outgoing]) -> dict[str, Any]:
    """The family's fields over those of the source, whose other fields (version, own additions) stay."""
    kept = read_object(base, limit=_MAX_CONFIG) if base is not None else {}
    kept = {name: value for name, value in kept.items() if name not in _DROPPED}
    stored = [tensor.dtype for tensor in outgoing]
    dtype = max(set(stored), key=lambda name: (stored.count(name), BYTES[name]))
    # transformers 5 reads `dtype`, 4 before 4.56 only `torch_dtype`.
    return {**kept, **fields, "dtype": dtype, "torch_dtype": dtype}


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {name: fields[name] for name in tokens if fields.get(name) is not None}


def _verify(directory: Path, outgoing: Sequence[Outgoing], checksums: Mapping[str, int]) -> None:
    """Open what was written as a reader would, and compare names, shapes, dtypes and bytes."""
    written = open_directory(directory).tensors
    check_tensors(written, {tensor.name: tensor.shape for tensor in outgoing})
    for tensor in outgoing:
        checksum = 0
        for block in row_blocks(whole(tensor.shape), values=_BLOCK_VALUES):
            checksum = zlib.crc32(raw_bytes(written.read(tensor.name, block)), checksum)
        if written.dtype(tensor.name) != tensor.dtype or checksum != checksums[tensor.name]:
            raise DataError(f"{tensor.name} reads back differently from what was written; check the disk and try again")


CONVERTER = HfConverter()
