"""A Hugging Face checkpoint directory: what must be in it, what may be, and what is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo import Checksums, DataError, HubCheckpoint
from zoo.conversion.disk.files import open_file, read_bounded
from zoo.conversion.disk.foreign import ADAPTER, adapter_refusal, check_quantised
from zoo.conversion.disk.headers import NAME, NAME_RULE
from zoo.conversion.disk.hub_source import HubSource
from zoo.conversion.disk.strict_json import parse_object
from zoo.core.model.inventory import MAX_TENSORS
from zoo.core.storage.companions import companion_names
from zoo.core.storage.finished import changed_directory
from zoo.core.tokenizer.files import TEMPLATES

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_CONFIG = 1 << 20
_MAX_INDEX = 10 << 20
MAX_COMPANION = 256 << 20
"""Bytes of a tokenizer file; the largest that are published have some 35 MB."""
_MAX_VALUES = 100_000
_MAX_CONTAINERS = 10_000
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")
_MODEL_TYPE = re.compile(r"[!-~]{1,64}")
_PICKLE = re.compile(r"[\w.-]{1,120}\.(bin|pt|pth|ckpt|nemo|distcp)", re.ASCII)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a directory is meant as such a checkpoint, however broken."""
    names = (CONFIG, SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", *ADAPTER)
    return os.path.isdir(path) and any(os.path.lexists(path / name) for name in names)


def open_directory(path: Path) -> HubCheckpoint:
    """Check everything that can be checked without a model and without reading a tensor. Raises DataError."""
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such directory")
    if any(name in ADAPTER for name in _names(path)):
        raise adapter_refusal(path)
    checksums = _checksums(path)
    config = read_object(path / CONFIG, limit=_MAX_CONFIG)
    _check_kind(path / CONFIG, config)
    check_quantised(path, config)
    # Code that comes with a checkpoint is never run, and must not be passed on either.
    config.pop("auto_map", None)
    return HubCheckpoint(path=path, config=config, tensors=_tensors(path), files=companions(path), checksums=checksums)


def companions(path: Path) -> tuple[str, ...]:
    """Names of the other files that belong to a checkpoint: tokenizer, templates, licence. Never opened as anything.

    Raises DataError for one that is no plain file of the directory or absurdly large.
    """
    names = _companion_names(path)
    if any("/" in name for name in names) and os.path.islink(path / TEMPLATES):
        raise DataError(f"{path / TEMPLATES}: a link in place of a folder is not followed; put the folder itself there")
    for name in names:
        _check_companion(path / name)
    return names


def read_object(file: Path, *, limit: int, values: int = _MAX_VALUES) -> dict[str, Any]:
    """A JSON object of bounded size. Raises DataError naming the file."""
    return parse_object(read_bounded(file, limit), f"{file}:", values=values, containers=_MAX_CONTAINERS)


def _checksums(path: Path) -> Checksums | None:
    """What zoo left of checksums when it wrote a directory; all but the tensors are compared. Raises DataError.

    Files that are never read, as a README, may come and go.
    """
    found = Checksums.read(path)
    if found is None:
        return None
    weights = [name for name in _names(path) if name in (CONFIG, INDEX) or _SHARD.fullmatch(name)]
    reason = found.misfit([*weights, *_companion_names(path)])
    small = [name for name in found.sums if not _SHARD.fullmatch(name) and found.sums[name].length <= MAX_COMPANION]
    reason = reason or found.changed(small)
    if reason:
        raise changed_directory(path, reason)
    return found


def _companion_names(path: Path) -> tuple[str, ...]:
    try:
        return companion_names(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}")


def _check_companion(file: Path) -> None:
    descriptor = open_file(file)
    try:
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size > MAX_COMPANION:
        raise DataError(f"{file}: {size} bytes, more than the {MAX_COMPANION} that are allowed")


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    """Plugins match checkpoints by this field, and errors show it."""
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and _MODEL_TYPE.fullmatch(kind)):
        raise DataError(f"{file}: model_type is {kind!r:.80}: it must be a name of at most 64 characters")


def _tensors(path: Path) -> HubSource:
    single, index = path / SINGLE, path / INDEX
    there = os.path.lexists(single), os.path.lexists(index)
    if all(there):
        raise DataError(f"{path} has both {SINGLE} and {INDEX}, and loaders disagree about which counts; remove one")
    if there[0]:
        return HubSource.single(single)
    if there[1]:
        return HubSource.sharded(path, _weight_map(index), index=index)
    raise _no_weights(path)


def _weight_map(index: Path) -> Mapping[str, str]:
    """From tensor to plain file name: a path could lead out of the directory."""
    weight_map = read_object(index, limit=_MAX_INDEX, values=MAX_TENSORS + 100).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: weight_map must be an object from tensor to file")
    for name, file in weight_map.items():
        if not NAME.fullmatch(name):
            raise DataError(f"{index}: tensor {name[:120]!r}: a name must be {NAME_RULE}")
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise DataError(
                f"{index}: weight_map[{name[:120]!r}] is {file!r:.120}: it must be the plain name of a .safetensors "
                f"file in the same directory"
            )
    return weight_map


def _no_weights(path: Path) -> DataError:
    pickles = [name for name in _names(path) if _PICKLE.fullmatch(name)]
    if not pickles:
        return DataError(f"{path} has neither {SINGLE} nor {INDEX}; fetch the weights too")
    return DataError(
        f"{path}: {pickles[0]} is a pickle, which can run any code when it is opened, so it is never read; fetch the "
        f"repository's .safetensors files, or save it again with transformers: save_pretrained(DIR)"
    )
