"""Opens `--data stdlib`: the source text of this Python's standard library, a corpus that every machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo import hookimpl
from zoo.core.contracts.entries import load_target

if TYPE_CHECKING:
    from zoo import DataSource

ZOO_PLUGIN_API = 1

_HELD_OUT = {"stdlib": False, "stdlib:held-out": True}
"""The words it answers to, and whether each means the part that is kept for measuring."""


# Not last, unlike other built-ins: it answers to its own two words only, and files would take them for paths.
@hookimpl
def zoo_open_data(uri: str) -> DataSource | None:
    if uri not in _HELD_OUT:
        return None
    source: DataSource = load_target("zoo.plugins.data.stdlib:open_stdlib")(held_out=_HELD_OUT[uri])
    return source
