"""Messages as their writers leave them, checked and put into the one shape that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from zoo import DataError

Message: TypeAlias = "dict[str, Any]"

ASSISTANT = "assistant"
"""The role that is trained."""

UNTRAINED = frozenset({"system", "developer", "user", "tool", "function", "ipython", "environment", "observation"})
"""Roles that are not trained, and are not meant to be."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which its reasoning stands beside the content."""

_ANSWERS = {0: False, 1: True}


def read_messages(value: Any, *, column: str, where: object) -> list[Message]:
    """Return the messages of a column, itself or as JSON text, without keys that hold null.

    A `function_call` becomes the tool call that it was called later. Raises DataError naming the message unless each
    is an object with a role, and a content that is text or parts of text, or tool calls.
    """
    value = from_json(value, what=f"{where}: column {column}")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {column} must be a list of messages, not {described(value)}")
    return [_message(one, column, f"{where}: message {number}") for number, one in enumerate(value, start=1)]


def is_trained(message: Message, *, where: str) -> bool:
    """Whether what an assistant says is trained: not if its `weight` is 0 or its `train` is false.

    Raises DataError for any other value than 0, 1, false and true.
    """
    said = [_yes_or_no(message[key], f"{where} has {key}") for key in ("weight", "train") if key in message]
    return all(said)


def from_json(value: Any, *, what: str) -> Any:
    """Return what a JSON text holds, and anything else as it is. Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{what} is text that is not JSON; write it as JSON") from None


def described(value: Any) -> str:
    """Return what a value is, for an error."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(sorted(map(str, value))[:5]) or 'nothing'}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "a number"
    return "an empty list" if value == [] else "a string" if isinstance(value, str) else f"a {type(value).__name__}"


def call_of(tool_call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return name and arguments of a tool call, which most writers put one level down."""
    function = tool_call.get("function")
    return function if isinstance(function, Mapping) else tool_call


def arguments_of(message: Message) -> list[Any]:
    """Return the arguments of each tool call of a message."""
    return [call_of(call).get("arguments") for call in message.get("tool_calls", ())]


def _yes_or_no(value: Any, what: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in _ANSWERS:
        raise DataError(f"{what} {value!r}; it is 0 or 1, false or true: a turn is trained or it is not")
    return _ANSWERS[int(value)]


def _message(value: Any, column: str, where: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        from_value = isinstance(value, Mapping) and {"from", "value"} <= set(value)
        hint = "; rename from and value, human and gpt to role and content, user and assistant" if from_value else ""
        if isinstance(value, Mapping) and "role" in value:
            hint = f", whose role is {described(value['role'])}"
        raise DataError(
            f"{where} of column {column} must be an object with a role and a content, not {described(value)}{hint}"
        )
    # A table has a column for each key that any message has; a template would take null for something.
    message = _without_null(value)
    calls = _tool_calls(message, where)
    message.pop("function_call", None)
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
        # Stock templates ask whether the content is none.
        message.setdefault("content", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(part, number, where) for number, part in enumerate(content, start=1)]
    elif not isinstance(content, str) and not (calls and content is None):
        found = f"; it is {described(content)}" if "content" in value else f", and is {described(value)}"
        raise DataError(f"{where} of column {column} needs a content that is text{found}")
    _check_reasoning(message, where)
    return message


def _tool_calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = from_json(message.get("tool_calls", []), what=f"{where}: tool_calls")
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls must be a list, not {described(calls)}")
    if "function_call" in message:
        calls = [{"type": "function", "function": message["function_call"]}, *calls]
    return [_tool_call(call, where) for call in calls]


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        call = _without_null(value)
        function = call_of(call)
        if isinstance(function.get("name"), str):
            if isinstance(call.get("function"), Mapping):
                call["function"] = _without_null(function)
                call["function"].setdefault("arguments", {})
            return call
    raise DataError(f"{where}: a tool call must be an object with a function that has a name, not {described(value)}")


def _part(value: Any, number: int, where: str) -> dict[str, Any]:
    part = _without_null(value) if isinstance(value, Mapping) else {}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return part
    kind = f"of type {part['type']!r}" if isinstance(part.get("type"), str) else described(value)
    if part.get("type") == "text":
        kind += f" and its text is {described(part.get('text'))}"
    raise DataError(
        f'{where}: part {number} of its content is {kind}; only text is trained on: write it as {{"type": "text", '
        '"text": ...}, or take the sample out'
    )


def _without_null(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _check_reasoning(message: Message, where: str) -> None:
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            raise DataError(f"{where}: {key} must be text, not {described(message[key])}")
