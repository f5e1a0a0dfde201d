"""The `messages` data format: conversations, written by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo import DataError, DataFormatEntry, hookimpl

ZOO_PLUGIN_API = 1

_UNREAD = {
    ("conversations",): "rename it messages, and from and value in it (human, gpt) role and content (user, assistant)",
    ("conversation",): "rename it messages, a list of {role, content} with the roles user and assistant",
    ("chosen", "rejected"): "zoo does not train on preferences; to train on what was chosen, rename that messages",
    ("input_ids",): "tokens are not read, since zoo packs and masks text itself; give text, messages, or prompt and "
    "completion",
    ("instruction", "output"): "write instruction and input as prompt, and output as completion",
    ("instruction", "response"): "rename them prompt and completion",
    ("prompt", "response"): "rename response completion",
    ("prompt", "output"): "rename output completion",
    ("question", "answer"): "rename them prompt and completion",
}
"""Columns that other tools know, and what to do about them."""

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
        _check_known(set(columns))
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


def _check_known(columns: set[str]) -> None:
    """Raise DataError for columns that are in use elsewhere and not here, unless those of a format are beside them."""
    for names, advice in _UNREAD.items():
        if columns.issuperset(names) and "text" not in columns and not {"prompt", "completion"} <= columns:
            raise DataError(f"column{'s' * (len(names) > 1)} {' and '.join(names)} cannot be read: {advice}")
