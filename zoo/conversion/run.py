"""A run of zoo as a checkpoint to read from, one tensor at a time and without a process group.

Format: torch.distributed.checkpoint's, weights under `model.<parameter>`.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from zoo.conversion.directory import CONFIG, companions, read_object
from zoo.core.checkpoint import find
from zoo.core.contracts import HubCheckpoint, ModelSpec, TensorSource
from zoo.core.errors import DataError, UsageError
from zoo.core.rules import Index

_PREFIX = "model."
_MAX_CONFIG = 1 << 20
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
    "collections": ("OrderedDict",),
}
"""All that the metadata of a checkpoint is made of. A pickle that names anything else is not one."""


class RunSource:
    """Parameters of a saved state, under the family's own names, each as it was before it was cut among ranks."""

    def __init__(self, state: Path) -> None:
        """Raises DataError if `state` is no such directory."""
        self.state = state
        self._reader = _Reader(state)
        self._tensors = {
            name.removeprefix(_PREFIX): found
            for name, found in self._reader.metadata.state_dict_metadata.items()
            if name.startswith(_PREFIX) and isinstance(found, TensorStorageMetadata)
        }
        self._last: tuple[str, Tensor] | None = None
        if not self._tensors:
            raise DataError(f"{state}: holds no weights")

    def __str__(self) -> str:
        return str(self.state)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].properties.dtype).removeprefix("torch.")

    def read(self, name: str, index: Index) -> Tensor:
        """A piece in its stored dtype. The whole tensor is read and kept until another one is asked for."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._load(name)
        return self._last[1][index]

    def _load(self, name: str) -> Tensor:
        tensor = torch.empty(self.shape(name), dtype=getattr(torch, self.dtype(name)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_state({_PREFIX + name: tensor}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, Exception) as error:  # the former is no Exception
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.state}: {name} cannot be read ({reason}); use an earlier checkpoint") from None
        return tensor


class RunConverter:
    """A run directory, or one of its checkpoints. Read only: a run is written by training."""

    name: ClassVar[str] = "run"

    def locate(self, source: str) -> Path | None:
        """The last finished checkpoint of a run, or the checkpoint itself. Raises DataError if a run has none."""
        path = Path(source).expanduser()
        if not (path / "checkpoints").is_dir() and not (path / "state").is_dir():
            return None
        found = find(path)
        if found is None:
            raise DataError(f"{path} has no finished checkpoint; let the run reach its first save")
        return found

    def open(self, path: Path) -> HubCheckpoint:
        """A checkpoint of a run. Raises DataError."""
        hub = path / "hub"
        config = read_object(hub / CONFIG, limit=_MAX_CONFIG)
        tensors = RunSource(path / "state")
        return HubCheckpoint(path=hub, config=config, tensors=tensors, files=companions(hub), own_names=True)

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
        """Raises UsageError: training writes runs."""
        raise UsageError("a run is written by `zoo finetune`, not by an export; use --to hf")


class _Reader(FileSystemReader):
    """Metadata is read once, and only what metadata is made of is unpickled."""

    def __init__(self, state: Path) -> None:
        super().__init__(str(state))
        try:
            content = (state / ".metadata").read_bytes()
            found = _MetadataUnpickler(io.BytesIO(content)).load()
        except Exception as error:
            raise DataError(f"{state}: no readable checkpoint state ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(found, Metadata):
            raise DataError(f"{state}: .metadata is no checkpoint metadata")
        for info in (found.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise DataError(f"{state}: .metadata names {info.relative_path!r:.120}, which is no plain file name")
        self.metadata = found

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self.metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"metadata must not name {module}.{name}")


CONVERTER = RunConverter()
