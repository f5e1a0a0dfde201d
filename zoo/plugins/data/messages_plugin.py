"""The `messages` data format: conversations, written by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo.core.entries import DataFormatEntry
from zoo.core.errors import DataError
from zoo.core.hookspecs import hookimpl

MESSAGES = DataFormatEntry(
    name="messages",
    target="zoo.plugins.data.messages:messages_sample",
    help="column messages: a conversation as a list of {role, content}, trained on what the assistant says",
)


@hookimpl
def zoo_register_data_formats() -> Sequence[DataFormatEntry]:
    return (MESSAGES,)


@hookimpl(trylast=True)
def zoo_detect_data_format(columns: Collection[str]) -> str | None:
    if "messages" not in columns:
        return None
    # A prompt alone, without its completion, is often there beside messages and means nothing more.
    others = [("text", {"text"}), ("completion", {"prompt", "completion"})]
    also = [name for name, needed in others if needed <= set(columns)]
    if also:
        raise DataError(
            f"its columns ({', '.join(sorted(columns))}) fit the data formats messages and {' and '.join(also)}; "
            f"say which is meant: --data-format messages or {' or '.join(also)}"
        )
    return "messages"
