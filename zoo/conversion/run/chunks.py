"""Where the bytes of a saved chunk of a tensor lie: torch.save's zip, opened without torch and without unpickling.

Format: torch.distributed.checkpoint's files hold one such zip for each chunk. Its entry `data/0`, not compressed, is
the storage; `data.pkl` says dtype, offset, size and stride of the view of it that the chunk is.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo import DataError
from zoo.conversion.disk.ranges import Files, Place
from zoo.core.contracts.weights import Shape

_MAX_PICKLE = 1 << 16
_LOCAL_HEADER = 30
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    values: int


@dataclass(frozen=True, slots=True)
class _View:
    """What torch rebuilds a tensor from."""

    storage: _Storage
    offset: int
    size: Shape
    stride: Shape


def chunk_place(files: Files, file: Path, start: int, length: int) -> Place:
    """The place of the tensor in a zip of so many bytes in a file. Raises DataError if there is none."""
    window = _Window(files, file, start, length)
    try:
        with zipfile.ZipFile(window) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.getinfo(pickled).file_size > _MAX_PICKLE:
                raise ValueError("data.pkl is too large")
            view = _ViewUnpickler(io.BytesIO(archive.read(pickled))).load()
            if not isinstance(view, _View):
                raise ValueError("not a tensor")
            entry = archive.getinfo(f"{pickled.removesuffix('/data.pkl')}/data/{view.storage.key}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: no readable chunk of a tensor at {start} ({_reason(error)})") from None
    return _place(window, entry, view)


def _place(window: _Window, entry: zipfile.ZipInfo, view: _View) -> Place:
    offset, item = view.offset, view.storage.dtype.itemsize
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != view.storage.values * item:
        raise DataError(f"{window.file}: the chunk at {window.start} is compressed or has another size than it says")
    values = 1
    for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
        if size != 1 and stride != values:
            raise DataError(f"{window.file}: the chunk at {window.start} is not in C order")
        values *= size
    if not 0 <= offset <= view.storage.values - values:
        raise DataError(f"{window.file}: the chunk at {window.start} lies outside of its storage")
    window.seek(entry.header_offset)
    header = window.read(_LOCAL_HEADER)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    first = window.start + entry.header_offset + _LOCAL_HEADER + name + extra
    return Place(window.file, first + offset * item, view.size, view.storage.dtype)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, files: Files, file: Path, start: int, length: int) -> None:
        self.file, self.start = file, start
        self._files, self._length, self._position = files, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        buffer[:count] = self._files.read_bytes(self.file, self.start + self._position, count)
        self._position += count
        return count


class _ViewUnpickler(pickle.Unpickler):
    """Reads the one call that such a pickle is made of; nothing of it is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_rest: _View(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"a chunk must not name {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, values = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a chunk must be a tensor of floating-point numbers")
        return _Storage(str(key), dtype, int(values))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
