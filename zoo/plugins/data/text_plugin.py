"""The `text` data format: plain text, all of it trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo import DataFormatEntry, hookimpl

ZOO_PLUGIN_API = 1

TEXT = DataFormatEntry(
    name="text",
    target="zoo.plugins.data.text:text_sample",
    help="column text: plain text, every token trained",
    overlong="split",
)


@hookimpl
def zoo_register_data_formats() -> Sequence[DataFormatEntry]:
    return (TEXT,)


@hookimpl(trylast=True)
def zoo_detect_data_format(columns: Collection[str]) -> str | None:
    other = "messages" in columns or {"prompt", "completion"} <= set(columns)
    return "text" if "text" in columns and not other else None
