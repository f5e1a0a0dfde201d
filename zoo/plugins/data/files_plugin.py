"""Opens `--data` as files: one file, a directory, or a glob."""

from __future__ import annotations

from zoo.core.formats import DataSource
from zoo.core.hookspecs import hookimpl
from zoo.plugins.data.files import open_files


@hookimpl(trylast=True)
def zoo_open_data(uri: str) -> DataSource | None:
    # The last to be asked: a path that does not exist is an error with the nearest names, not somebody else's turn.
    return open_files(uri)
