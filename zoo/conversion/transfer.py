"""From an opened checkpoint to a directory of some form: checked against the family first, streamed after."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import Converter, DataError, HubCheckpoint, ModelSpec, Registry, TensorSource
from zoo.conversion.disk.directory import CONFIG, open_directory
from zoo.conversion.disk.writer import parse_size
from zoo.core.humanize import format_duration
from zoo.core.model.answers import loaded_spec, parsed
from zoo.core.model.inventory import IGNORABLE, checked_book
from zoo.core.plan.origin import family_of, open_checkpoint
from zoo.core.storage.finished import require_intact

STORED = "stored"
"""`--dtype stored`: each tensor in its own type."""
_TOO_WIDE, _WIDEST = "float64", "float32"
"""A run may compute in the one; the other is the widest that is published, and all that vLLM knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint whose family is known, its tensors checked by name and shape and seen under the family's names."""

    checkpoint: HubCheckpoint
    spec: ModelSpec
    config: Any
    tensors: TensorSource


def open_checked(source: str, registry: Registry) -> Opened:
    """Find, open and check a checkpoint: hub id, directory, run. Raises UsageError, PluginError or DataError."""
    checkpoint = open_checkpoint(source, registry)
    spec = loaded_spec(registry.models, family_of(checkpoint, source, registry))
    config = parsed(spec, checkpoint.config)
    book = checked_book(checkpoint, spec, config)
    tensors = checkpoint.tensors if checkpoint.own_names else book.to_ours(checkpoint.tensors)
    return Opened(checkpoint=checkpoint, spec=spec, config=config, tensors=tensors)


def transfer(
    opened: Opened,
    converter: Converter,
    out: Path,
    *,
    dtype: str | None = None,
    shard_size: str = "5GB",
    threads: int | None = None,
) -> str:
    """Write a checkpoint in another place and form, with the files that belong to it. Returns a sentence about it.

    Raises UsageError or DataError.
    """
    started = time.perf_counter()
    require_intact(opened.checkpoint.checksums, of_run=opened.checkpoint.own_names, threads=threads)
    files = {name: opened.checkpoint.path / name for name in (*opened.checkpoint.files, CONFIG)}
    converter.export(
        opened.spec,
        opened.config,
        opened.tensors,
        out,
        files=files,
        dtype=written_dtype(opened, dtype),
        shard_bytes=parse_size(shard_size),
        threads=threads,
    )
    return _report(out, time.perf_counter() - started) + _origin(opened.checkpoint)


def written_dtype(opened: Opened, asked: str | None) -> str | None:
    """What tensors are cast to; None to leave each as it is. Raises DataError if they differ and nothing is said.

    A tensor of another type than the rest is mostly a damaged one. Of a run in float64, float32 is written.
    """
    if asked is not None:
        return None if asked == STORED else asked
    tensors = opened.checkpoint.tensors
    dtypes = {name: tensors.dtype(name) for name in tensors.names() if not IGNORABLE.search(name)}
    kinds = Counter(dtypes.values()).most_common()
    if len(kinds) > 1:
        usual, odd = kinds[0][0], kinds[-1][0]
        name = next(name for name, dtype in dtypes.items() if dtype == odd)
        raise DataError(
            f"{tensors}: {name} is {odd}, and most tensors are {usual}; --dtype {usual} makes all alike, "
            f"--dtype {STORED} leaves each as it is"
        )
    return _WIDEST if opened.checkpoint.own_names and _TOO_WIDE in dtypes.values() else None


def _origin(checkpoint: HubCheckpoint) -> str:
    """What to add of a run: which checkpoint it was, and whether it could be compared with anything."""
    if not checkpoint.own_names:
        return ""
    unchecked = ", which has no checksums, so it was read unchecked" if checkpoint.checksums is None else ""
    return f"; from {checkpoint.path.parent}{unchecked}"


def _report(out: Path, seconds: float) -> str:
    files: Sequence[Path] = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    tensors = len(open_directory(out).tensors.names())
    what = f"{len(files)} files, {size / 2**30:.3g} GiB, {tensors} tensors"
    rate = f"{format_duration(seconds)}, {size / 1e6 / seconds:.0f} MB/s"
    return f"{out} ({what}) verified: names, shapes, dtypes, bytes; {rate}"
