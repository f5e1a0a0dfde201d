"""The `messages` data format: conversations, written by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo.core.contracts import DataFormatEntry
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
    others = sorted({"text", "prompt", "completion"} & set(columns))
    if others:
        raise DataError(
            f"columns messages and {', '.join(others)} are all there; say which is meant: --data-format messages, "
            "text or completion"
        )
    return "messages"
