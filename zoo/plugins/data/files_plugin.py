"""Opens `--data` as files: one file, a directory, or a glob."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo import hookimpl
from zoo.core.contracts.entries import load_target

if TYPE_CHECKING:
    from zoo import DataSource

ZOO_PLUGIN_API = 1


@hookimpl(trylast=True)
def zoo_open_data(uri: str) -> DataSource | None:
    # The last to be asked: a path that does not exist is an error with the nearest names, not somebody else's turn.
    source: DataSource = load_target("zoo.plugins.data.files:open_files")(uri)
    return source
