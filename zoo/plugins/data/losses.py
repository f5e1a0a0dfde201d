"""What of a conversation does not appear in its rendering: content, reasoning, tool calls, tools, documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo import Remark
from zoo.plugins.data.turns import ASSISTANT, REASONING, Message, arguments_of, call_of

_THINK = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that the template leaves out or writes as something else."""

    what: str
    message: int | None = None
    """Its index; None for what belongs to no message."""

    @property
    def remark(self) -> Remark:
        if self.message is None:
            return Remark(f"conversations whose {self.what} the chat template leaves out or changes")
        kind = f"turns whose {self.what} the chat template leaves out or changes"
        return Remark(kind, f"message {self.message + 1}")


def lost(
    messages: Sequence[Message], text: str, *, variables: Mapping[str, Any], turns: Mapping[int, str]
) -> list[Loss]:
    """Compare a conversation with its rendering, from front to back.

    `turns` are the parts of the text that those messages became, where they are known: what stands elsewhere is
    another's.
    """
    losses = []
    at = 0
    for index, message in enumerate(messages):
        part = turns.get(index)
        found = _Found(text, at) if part is None else _Found(part)
        for what, said in (("content", _content(message)), ("reasoning", _reasoning(message))):
            if not all([found.moves(one) for one in said]):
                losses.append(Loss(what, index))
        if isinstance(message["content"], list) and not _well_written(message["content"], found.text):
            losses.append(Loss("content", index))
        if not all(found.has(one) for one in _calls(message)) or not _well_written(arguments_of(message), found.text):
            losses.append(Loss("tool calls", index))
        at = found.at if part is None else at
    losses += [Loss("content", one) for one in _printed_none(messages, text, variables)]
    everything = _Found(text)
    beside = {"tools": _tools(variables), "documents": list(_leaves(variables.get("documents")))}
    losses += [Loss(name) for name, said in beside.items() if not all(map(everything.has, said))]
    return list(dict.fromkeys(losses))


@dataclass(slots=True)
class _Found:
    """A text in which one thing after the other is looked for."""

    text: str
    at: int = 0
    """Where the last content that was found ends."""

    def moves(self, said: str) -> bool:
        """Whether a content is there, behind the one before or, as system messages may be, moved."""
        for form in _forms(said.strip()):
            place = self.text.find(form, self.at)
            if place >= 0:
                self.at = place + len(form)
                return True
            if self.at and form in self.text:
                return True
        return False

    def has(self, said: Any) -> bool:
        """Whether a name or a value is there, which may be too short to say where."""
        forms = _forms(said.strip()) if isinstance(said, str) else (json.dumps(said), str(said))
        return any(self.text.find(form, self.at) >= 0 or form in self.text for form in forms)


def _forms(said: str) -> Iterator[str]:
    """A text as it is, then as it stands in JSON."""
    yield said
    for ascii_only in (False, True):
        written = json.dumps(said, ensure_ascii=ascii_only)[1:-1]
        if written != said:
            yield written


def _content(message: Message) -> list[str]:
    content = message["content"]
    if isinstance(content, list):
        return [part["text"] for part in content]
    return _thoughts(message)[-1:] or [content or ""]


def _reasoning(message: Message) -> list[str]:
    return [*_thoughts(message)[:-1], *(message.get(key, "") for key in REASONING)]


def _thoughts(message: Message) -> list[str]:
    """Reasoning and answer, where the content holds both; templates take them apart."""
    content = message["content"]
    if message["role"] != ASSISTANT or not isinstance(content, str) or "</think>" not in content:
        return []
    return _THINK.split(content)


def _calls(message: Message) -> Iterator[Any]:
    """Names of the tools called, and what is in their arguments."""
    yield from (call_of(call)["name"] for call in message.get("tool_calls", ()))
    yield from _leaves([one for one in arguments_of(message) if not isinstance(one, str)])


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values, all the way down."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _well_written(values: Sequence[Any], text: str) -> bool:
    """Whether JSON texts are there as they are, and no object as Python prints it."""
    return all(
        value.strip() in text if isinstance(value, str) else f"{{{next(iter(value))!r}: " not in text
        for value in values
        if value and isinstance(value, str | Mapping)
    )


def _printed_none(messages: Sequence[Message], text: str, variables: Mapping[str, Any]) -> list[int]:
    """The messages without content, if the template wrote `None` for one of them."""
    empty = [index for index, message in enumerate(messages) if message["content"] is None]
    if not empty or "None" not in text:
        return []
    said = json.dumps([messages, variables], ensure_ascii=False, default=str).count("None")
    return empty if text.count("None") > said else []


def _tools(variables: Mapping[str, Any]) -> list[str]:
    tools = variables.get("tools")
    named = [call_of(tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
    return [name for name in named if isinstance(name, str)]
