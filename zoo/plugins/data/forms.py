"""Forms of one conversation that mean the same, for templates that know one of them only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from zoo.plugins.data.turns import Message, call_of


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages as they are, then changed: parts of text joined, tool calls in their other form, no null."""
    known = (_joined, _with_functions, _with_other_arguments, _with_content)
    changes = [change for change in known if any(map(change, messages))]
    for chosen in product((False, True), repeat=len(changes)):
        form = list(messages)
        for change in (change for change, wanted in zip(changes, chosen, strict=True) if wanted):
            form = [change(message) or message for message in form]
        yield form


def _joined(message: Message) -> Message | None:
    """With one text for parts of text; most templates would print the list. None if there is nothing to change."""
    content = message["content"]
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else None


def _with_content(message: Message) -> Message | None:
    """With an empty content for none beside tool calls; some templates ask for one, some print `None` for the other."""
    return {**message, "content": ""} if message["content"] is None else None


def _with_functions(message: Message) -> Message | None:
    """With name and arguments of tool calls one level down, where most templates look for them."""
    calls = message.get("tool_calls", ())
    if not any(call_of(call) is call for call in calls):
        return None
    return {**message, "tool_calls": [_nested(call) if call_of(call) is call else call for call in calls]}


def _nested(call: Mapping[str, Any]) -> dict[str, Any]:
    outside = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {"type": "function", **outside, "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _with_other_arguments(message: Message) -> Message | None:
    """With arguments of tool calls as objects where they are JSON text, and the other way round.

    A template that writes objects as JSON would write the text once more as JSON; one that copies the text prints an
    object as Python does, or fails on it.
    """
    changed = [_with(call, _other(call_of(call).get("arguments"))) for call in message.get("tool_calls", ())]
    if not any(changed):
        return None
    return {**message, "tool_calls": [new or old for new, old in zip(changed, message["tool_calls"], strict=True)]}


def is_unreadable(arguments: Any) -> bool:
    """Whether arguments of a tool call are text that is no JSON object."""
    return isinstance(arguments, str) and _other(arguments) is None


def _other(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Mapping) else None


def _with(call: Mapping[str, Any], arguments: Any) -> dict[str, Any] | None:
    if arguments is None:
        return None
    if call_of(call) is call:
        return {**call, "arguments": arguments}
    return {**call, "function": {**call["function"], "arguments": arguments}}
