"""The Python standard library's source as a corpus, with a part held out for measuring."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from zoo import DataError
from zoo.plugins.data.files import File, FileSource

HELD_OUT_OF = 20
"""One file in so many, chosen by a hash of its name, is held out."""

_PASSED_OVER = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    # Tables rather than text.
    "encodings",
    "pydoc_data",
}


def open_stdlib(*, held_out: bool) -> FileSource:
    """The .py files of this interpreter's standard library, one record each; tests and tables are left out.

    Raises DataError if this Python has come without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in _modules(root) if is_held_out(name) == held_out]
    if not names:
        raise DataError(f"--data stdlib: {root} holds no .py files: this Python ships without source; give --data PATH")
    return FileSource(tuple(File(root / name, name, (root / name).stat().st_size) for name in names))


def is_held_out(name: str) -> bool:
    """Whether a file, by its path below the library's root, belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT_OF == 0


def _modules(root: Path) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _PASSED_OVER]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(path.relative_to(root).as_posix() for path in found)
