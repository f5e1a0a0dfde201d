"""A run of zoo as a checkpoint to read from, by byte ranges of its chunks and without a process group.

Format: torch.distributed.checkpoint's, weights under `model.<parameter>`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from zoo import Checksums, DataError, HubCheckpoint, ModelSpec, Piece, TensorSource, UsageError
from zoo.conversion.disk.directory import CONFIG, companions, read_object
from zoo.conversion.disk.ranges import Files, Place
from zoo.conversion.run.chunks import chunk_place
from zoo.core.contracts.weights import Index
from zoo.core.model.rules import check_cover
from zoo.core.storage.finished import PROGRESS, damaged, find

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
        self._files = Files()
        self._known: dict[str, Sequence[tuple[Piece, Place]]] = {}
        self._metadata, self._digest = _read_metadata(state)
        self._tensors = {
            name.removeprefix(_PREFIX): found
            for name, found in self._metadata.state_dict_metadata.items()
            if name.startswith(_PREFIX) and isinstance(found, TensorStorageMetadata)
        }
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

    def fingerprint(self) -> str:
        """Of the metadata and of the names, sizes and times of the files."""
        digest = hashlib.sha256(self._digest)
        for file in sorted(self.state.glob("*.distcp")):
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def read(self, name: str, index: Index, buffer: Tensor | None = None) -> Tensor:
        """A piece in its stored dtype; little more than it is read. Raises DataError."""
        pieces = self._pieces(name)
        if len(pieces) == 1:
            return self._files.read(pieces[0][1], index, buffer)
        out = torch.empty([i.stop - i.start for i in index], dtype=self._tensors[name].properties.dtype)
        for piece, place in pieces:
            if common := piece.of_ours(index):
                here, there = common
                out[here] = self._files.read(place, there)
        return out

    def _pieces(self, name: str) -> Sequence[tuple[Piece, Place]]:
        """The chunks of a tensor and where they lie; together they are all of it. Raises DataError."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> Sequence[tuple[Piece, Place]]:
        try:
            found = [(_piece(name, chunk), self._place(name, chunk)) for chunk in self._tensors[name].chunks]
        except DataError as error:
            raise DataError(f"{name} cannot be read: {error}; use an earlier checkpoint") from None
        boxes = [Piece(name, p.start, p.shape, within=(p.start, self.shape(name))) for p, _ in found]
        try:
            check_cover(name, [(name, box) for box in boxes])
        except (ValueError, IndexError):
            raise DataError(f"{self.state}: the chunks of {name} do not add up; use an earlier checkpoint") from None
        return found

    def _place(self, name: str, chunk: ChunkStorageMetadata) -> Place:
        info = self._metadata.storage_data.get(MetadataIndex(_PREFIX + name, chunk.offsets))
        if info is None or info.transform_descriptors:
            raise DataError(f"{self.state}: .metadata does not say where it lies")
        place = chunk_place(self._files, self.state / info.relative_path, info.offset, info.length)
        if place.shape != tuple(chunk.sizes) or place.dtype != self._tensors[name].properties.dtype:
            raise DataError(f"{place.file}: a chunk has another shape or dtype than .metadata says")
        return place


class RunConverter:
    """A run directory, or one of its checkpoints. Read only: a run is written by training."""

    name: ClassVar[str] = "run"

    def locate(self, source: str) -> Path | None:
        """The last checkpoint of a run, or the one named. Raises DataError if there is none or it is damaged."""
        path = Path(source).expanduser()
        if not any((path / name).exists() for name in ("checkpoints", "state", PROGRESS)):
            return None
        found = find(path)
        if found is None:
            raise DataError(f"{path} has no finished checkpoint; let the run reach its first save")
        return found

    def open(self, path: Path) -> HubCheckpoint:
        """A checkpoint of a run. Raises DataError."""
        hub = path / "hub"
        checksums = _checksums(path)
        config = read_object(hub / CONFIG, limit=_MAX_CONFIG)
        tensors = RunSource(path / "state")
        return HubCheckpoint(
            path=hub, config=config, tensors=tensors, files=companions(hub), own_names=True, checksums=checksums
        )

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
        """Raises UsageError: training writes runs."""
        raise UsageError("a run is written by `zoo finetune`, not by an export; use --to hf")


def _checksums(path: Path) -> Checksums | None:
    """What a checkpoint says of its files; all but the tensors are compared. Raises DataError."""
    found = Checksums.read(path)
    reason = found and found.changed(name for name in found.sums if not name.endswith(".distcp"))
    if reason:
        raise damaged(path, reason)
    return found


def _piece(name: str, chunk: ChunkStorageMetadata) -> Piece:
    return Piece(name, tuple(chunk.offsets), tuple(chunk.sizes))


def _read_metadata(state: Path) -> tuple[Metadata, bytes]:
    """What a state is made of, only that unpickled, and its SHA-256. Raises DataError."""
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
    return found, hashlib.sha256(content).digest()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"metadata must not name {module}.{name}")


CONVERTER = RunConverter()
