"""The Hugging Face checkpoint directory as a format: found, opened, written and verified."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from zoo import Checksums, DataError, HubCheckpoint, ModelSpec, TensorSource, __version__
from zoo.conversion.disk.directory import CONFIG, MAX_COMPANION, looks_like_checkpoint, open_directory, read_object
from zoo.conversion.disk.files import copy_file
from zoo.conversion.disk.headers import BYTES
from zoo.conversion.disk.progress import progress
from zoo.conversion.disk.stream import Stream, default_threads
from zoo.conversion.disk.unfinished import JOURNAL, check_space, check_target, unfinished
from zoo.conversion.disk.writer import SHARD_BYTES, Outgoing, Shard, plan_shards, write_index, write_json
from zoo.conversion.hf.hub import fetch, is_hub_id
from zoo.core.model.inventory import check_tensors, rule_book
from zoo.core.storage.checksums import Sum, sum_of_file
from zoo.core.storage.companions import GENERATION
from zoo.core.tokenizer.files import TEMPLATES

_MAX_CONFIG = 1 << 20
_DROPPED = ("auto_map", "_name_or_path", "quantization_config")


class HfConverter:
    """config.json, safetensors, tokenizer files: what transformers, vLLM and the hub read."""

    name: ClassVar[str] = "hf"

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
        shard_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Write `out` whole or not at all, then read it back and compare every byte. Raises DataError.

        `tensors` are under the family's own names. `files` are copied byte for byte, except that a `config.json`
        among them is the base over which the family's fields are laid.
        """
        check_target(out)
        book = rule_book(spec, config)
        check_tensors(tensors, book.shapes)
        source = book.to_hub(tensors)
        outgoing = [Outgoing(n, shape, dtype or source.dtype(n)) for n, shape in book.hub_shapes.items()]
        shards = plan_shards(outgoing, shard_bytes or SHARD_BYTES)
        size = sum(shard.size for shard in shards)
        with (
            unfinished(out, _fingerprint(source, shards)) as (directory, journal),
            progress(out.name, size) as tick,
        ):
            check_space(directory, size)
            stream = Stream(directory, source, journal, threads=threads or default_threads(), tick=tick)
            sums = stream.write(shards)
            _write_others(directory, spec.hub_config(config), files, outgoing, shards)
            _check_written(directory, outgoing)
            _write_checksums(directory, sums)


def _fingerprint(source: TensorSource, shards: Sequence[Shard]) -> str:
    """Of a conversion: the same one writes the same bytes at the same places."""
    if not source.fingerprint():
        return uuid.uuid4().hex
    digest = hashlib.sha256(f"{__version__} {source.fingerprint()}".encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()


def _write_others(
    directory: Path,
    fields: Mapping[str, Any],
    files: Mapping[str, Path],
    outgoing: Sequence[Outgoing],
    shards: Sequence[Shard],
) -> None:
    """Everything but tensors, anew if an earlier attempt left some of it."""
    keep = {JOURNAL, *(shard.name for shard in shards)}
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
    write_index(directory, shards)
    _copy(files, directory)
    config = _config(fields, files.get(CONFIG), outgoing)
    write_json(directory / CONFIG, config)
    if GENERATION not in files:
        write_json(directory / GENERATION, _generation(config))


def _copy(files: Mapping[str, Path], directory: Path) -> None:
    for name, path in files.items():
        if name == CONFIG:
            continue
        target = directory / name
        if name not in (target.name, f"{TEMPLATES}/{target.name}") or target.exists():
            raise DataError(f"{name!r} cannot be copied into a checkpoint: it must be a plain name not used yet")
        target.parent.mkdir(exist_ok=True)
        copy_file(path, target, limit=MAX_COMPANION)


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


def _check_written(directory: Path, outgoing: Sequence[Outgoing]) -> None:
    """Open what was written as a reader would, and compare names, shapes and dtypes; bytes were compared before."""
    written = open_directory(directory).tensors
    check_tensors(written, {tensor.name: tensor.shape for tensor in outgoing})
    wrong = [tensor.name for tensor in outgoing if written.dtype(tensor.name) != tensor.dtype]
    if wrong:
        raise DataError(f"{wrong[0]} reads back in another dtype than was written; check the disk and try again")


def _write_checksums(directory: Path, shards: Mapping[str, Sum]) -> None:
    """Of all files that were written. Those that are no shards are small, so they are read for it."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    others = [name for name in found if name not in shards and name != JOURNAL]
    Checksums(directory, {**shards, **{name: sum_of_file(directory / name) for name in others}}).write()


CONVERTER = HfConverter()
