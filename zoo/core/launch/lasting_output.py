"""Output that outlives its reader: a closed terminal or a dead `tee` must end no run, least of all while it saves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast


class _Lasting:
    """A text stream. Once it cannot be written to any more, what is written goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._redirect()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._redirect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _redirect(self) -> None:
        """Give the descriptor another file, for what is still buffered and for writers that are not Python's."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def open_closed_streams() -> None:
    """Give a process that was started with stdin, stdout or stderr closed the null device in its place.

    Otherwise Python has no such stream, and the next file or socket gets the number on which others write.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            if descriptor != nowhere:
                os.dup2(nowhere, descriptor)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115  (as long as the process)
    if nowhere > 2:
        os.close(nowhere)


def outlive_readers() -> None:
    """Make stdout and stderr of this process such streams."""
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in (sys.stdout, sys.stderr))
