"""Two checkpoints of one model, tensor by tensor: equal, or which are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from zoo import DataError, TensorSource
from zoo.conversion.disk.directory import CONFIG, MAX_COMPANION
from zoo.conversion.disk.files import read_bounded
from zoo.conversion.disk.progress import progress
from zoo.conversion.disk.stream import Tick, checksum, default_threads, in_parallel
from zoo.conversion.disk.writer import Outgoing
from zoo.conversion.transfer import Opened, written_dtype
from zoo.core.model.inventory import rule_book
from zoo.core.storage.finished import require_intact


def compare(source: Opened, copy: Opened, *, dtype: str | None = None, threads: int | None = None) -> str:
    """Recompute the checksum of every tensor on both sides; nothing is written. Returns a sentence about it.

    `dtype` is what the copy was cast to. Raises DataError naming what differs.
    """
    require_intact(source.checkpoint.checksums, of_run=source.checkpoint.own_names, threads=threads)
    where = f"{copy.checkpoint.path} is no copy of {source.checkpoint.path}"
    if copy.spec.name != source.spec.name or _fields(copy) != _fields(source):
        raise DataError(f"{where}: their {CONFIG} describe different models; import it again into another OUT")
    book = rule_book(source.spec, source.config)
    cast = written_dtype(source, dtype)
    left, right = book.to_hub(source.tensors), book.to_hub(copy.tensors)
    tensors = [Outgoing(name, shape, cast or left.dtype(name)) for name, shape in book.hub_shapes.items()]
    size = sum(tensor.length for tensor in tensors)
    with progress("verify", 2 * size) as tick:
        wrong = _differing(left, right, tensors, threads or default_threads(), tick)
    if wrong:
        named = "; ".join(f"{name}: {reason}" for name, reason in sorted(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{where}: {named}{more}; import it again into another OUT")
    files = [name for name in source.checkpoint.files if name != CONFIG]
    for name in files:
        if _content(source.checkpoint.path / name) != _content(copy.checkpoint.path / name):
            raise DataError(f"{where}: {name} differs; copy that file again")
    # What belongs to no tensor, as a header, only the checksums know.
    require_intact(copy.checkpoint.checksums, of_run=copy.checkpoint.own_names, threads=threads)
    return (
        f"{copy.checkpoint.path}: {len(tensors)} tensors and {len(files)} files are those of {source.checkpoint.path}"
    )


def _differing(
    left: TensorSource, right: TensorSource, tensors: list[Outgoing], threads: int, tick: Tick
) -> Mapping[str, str]:
    wrong: dict[str, str] = {}

    def check(tensor: Outgoing, _buffer: Tensor) -> None:
        if right.dtype(tensor.name) != tensor.dtype:
            wrong[tensor.name] = f"{right.dtype(tensor.name)} and not {tensor.dtype}"
            return
        sums = [checksum(source, tensor, tick) for source in (left, right)]
        if sums[0] != sums[1]:
            wrong[tensor.name] = f"CRC-32 {sums[1]:08x} and not {sums[0]:08x}"

    in_parallel(threads, check, tensors)
    return wrong


def _fields(opened: Opened) -> Mapping[str, object]:
    return opened.spec.hub_config(opened.config)


def _content(file: Path) -> bytes | None:
    return read_bounded(file, MAX_COMPANION) if file.exists() else None
