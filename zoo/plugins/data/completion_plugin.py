"""The `completion` data format: a prompt and what should follow it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo import DataError, DataFormatEntry, hookimpl

ZOO_PLUGIN_API = 1

COMPLETION = DataFormatEntry(
    name="completion",
    target="zoo.plugins.data.completion:completion_sample",
    help="columns prompt and completion: two texts, or two lists of messages, trained on the second",
)


@hookimpl
def zoo_register_data_formats() -> Sequence[DataFormatEntry]:
    return (COMPLETION,)


@hookimpl(trylast=True)
def zoo_detect_data_format(columns: Collection[str]) -> str | None:
    if not {"prompt", "completion"} <= set(columns) or "messages" in columns:
        return None
    if "text" in columns:
        raise DataError(
            f"its columns ({', '.join(sorted(columns))}) fit the data formats completion and text; "
            "say which is meant: --data-format completion or text"
        )
    return "completion"
