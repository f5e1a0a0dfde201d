"""Opens `--data stdlib`: the source text of this Python's standard library, a corpus that every machine has."""

from __future__ import annotations

from zoo.core.formats import DataSource
from zoo.core.hookspecs import hookimpl
from zoo.plugins.data.stdlib import HELD_OUT, NAME, open_stdlib


# Not last, unlike other built-ins: it answers to its own two words only, and files would take them for paths.
@hookimpl
def zoo_open_data(uri: str) -> DataSource | None:
    return open_stdlib(held_out=uri == HELD_OUT) if uri in (NAME, HELD_OUT) else None
