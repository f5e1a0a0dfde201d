"""A Hugging Face checkpoint directory: what must be in it, what may be, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.conversion.hub_source import HubSource
from zoo.core.contracts import HubCheckpoint
from zoo.core.errors import DataError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"

_MAX_CONFIG = 1 << 20
_MAX_INDEX = 10 << 20
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPANIONS = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|tokenizer\.model"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json)|generation_config\.json|(LICENSE|NOTICE|USE_POLICY)[\w.-]*"
)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a directory is meant as such a checkpoint, however broken."""
    names = (CONFIG, SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return path.is_dir() and any((path / name).exists() for name in names)


def open_directory(path: Path) -> HubCheckpoint:
    """Check everything that can be checked without a model and without reading a tensor. Raises DataError."""
    if not path.is_dir():
        raise DataError(f"{path}: no such directory")
    config = read_object(path / CONFIG, limit=_MAX_CONFIG)
    # Code that comes with a checkpoint is never run, and must not be passed on either.
    config.pop("auto_map", None)
    return HubCheckpoint(path=path, config=config, tensors=_tensors(path), files=companions(path))


def companions(path: Path) -> tuple[str, ...]:
    """Names of the other files that belong to a checkpoint: tokenizer, templates, licence."""
    return tuple(sorted(p.name for p in path.iterdir() if p.is_file() and _COMPANIONS.fullmatch(p.name)))


def read_object(file: Path, *, limit: int) -> dict[str, Any]:
    """A JSON object of bounded size. Raises DataError naming the file."""
    try:
        with file.open("rb") as stream:
            text = stream.read(limit + 1)
    except FileNotFoundError:
        raise DataError(f"{file.parent} has no {file.name}; copy it from where the weights come from") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if len(text) > limit:
        raise DataError(f"{file}: more than the {limit} bytes that are allowed")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: must be a JSON object")
    return found


def _tensors(path: Path) -> HubSource:
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise DataError(f"{path} has both {SINGLE} and {INDEX}, and loaders disagree about which counts; remove one")
    if single.exists():
        return HubSource.single(single)
    if index.exists():
        return HubSource.sharded(path, _weight_map(index), index=index)
    raise _no_weights(path)


def _weight_map(index: Path) -> Mapping[str, str]:
    """From tensor to plain file name: a path could lead out of the directory."""
    weight_map = read_object(index, limit=_MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: weight_map must be an object from tensor to file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise DataError(
                f"{index}: weight_map[{name[:120]!r}] is {file!r:.120}: it must be the plain name of a .safetensors "
                f"file in the same directory"
            )
    return weight_map


def _no_weights(path: Path) -> DataError:
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if not pickles:
        return DataError(f"{path} has neither {SINGLE} nor {INDEX}; fetch the weights too")
    return DataError(
        f"{path}: {pickles[0]} is a pickle, which can run any code when it is opened, so it is never read; fetch the "
        f"repository's .safetensors files, or save it again with transformers: save_pretrained(DIR)"
    )
