"""How far a conversion is: a bar with MB/s on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from zoo.conversion.disk.stream import Tick


@contextmanager
def progress(what: str, size: int) -> Iterator[Tick]:
    """A function to be told of bytes as they are done, from any thread; they are `size` in all."""
    lock = threading.Lock()
    off = not sys.stderr.isatty()
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=off, leave=False, file=sys.stderr) as bar:

        def tick(count: int) -> None:
            with lock:
                bar.update(count)

        yield tick
