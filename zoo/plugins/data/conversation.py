"""What of a rendered conversation is trained: spans found by rendering its beginnings, for any chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from zoo.core.errors import DataError
from zoo.core.formats import Record, Sample
from zoo.core.tokenizer import Tokenizer

Span: TypeAlias = tuple[int, int]

_OWN_VARIABLES = {"messages", "add_generation_prompt", "self"}
"""What rendering itself gives to a template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages under a tokenizer's template. Errors say `where` the record is."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    """What else the template may use: tools, documents."""
    tokenizer: Tokenizer
    where: object

    def sample(self, turns: Sequence[int] | None) -> Sample:
        """Trained on the messages with these indices, or on everything if None.

        A turn's span is what the template adds to the rendering of all before it plus the generation prompt: the
        content and the end-of-turn token, without the header that a model is given. Raises DataError if the template
        rewrites earlier turns, so that there is no such span.
        """
        text = self._render(len(self.messages))
        spans = [(0, len(text))] if turns is None else [self._span(text, turn) for turn in turns]
        try:
            tokens, starts = self.tokenizer.encode_rendered(text)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from None
        return Sample(tokens, _inside(starts, spans))

    def _span(self, text: str, turn: int) -> Span:
        before = self._render(turn, add_generation_prompt=True)
        after = self._render(turn + 1)
        for prefix, what in ((before, f"before message {turn + 1}"), (after, f"up to message {turn + 1}")):
            if not text.startswith(prefix):
                raise DataError(
                    f"{self.where}: the chat template writes the conversation {what} differently when more follows, so "
                    "what the assistant says there cannot be told apart; type --loss-on last or all, or give another "
                    "template with --chat-template FILE"
                )
        return len(before), len(before) + len(self._without_tail(after[len(before) :]))

    def _without_tail(self, said: str) -> str:
        """Without white space after a special token: generation ends with that token, so nothing says the rest."""
        stripped = said.rstrip()
        return stripped if any(stripped.endswith(token) for token in self.tokenizer.special) else said

    def _render(self, count: int, *, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.render(
                self.messages[:count], add_generation_prompt=add_generation_prompt, **self.variables
            )
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from None


def checked_messages(value: Any, *, column: str, where: object) -> list[Mapping[str, Any]]:
    """The messages of a column. Raises DataError unless each is an object with a role and a content or tool calls."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {column} must be a list of messages, not {_described(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: message {number} of column {column} must be an object with a role and a content, "
                f"not {_described(message)}"
            )
        # A template writes nothing for what is missing and None for null, and both would be trained on.
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise DataError(
                f"{where}: message {number} of column {column} needs a content that is text, "
                f"and is {_described(message)}"
            )
    return value


def template_variables(record: Record) -> dict[str, Any]:
    """Columns `tools` and `documents`, and the entries of `chat_template_kwargs`, each as it is or as JSON text.

    No other column reaches the template: what it is called could mean something there. Raises DataError.
    """
    kwargs = _parsed(record, "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DataError(f"{record.where}: column chat_template_kwargs must be an object, not {_described(kwargs)}")
    named = {name: _parsed(record, name) for name in ("tools", "documents")}
    given = {**named, **(kwargs or {})}
    return {name: value for name, value in given.items() if value is not None and name not in _OWN_VARIABLES}


def _parsed(record: Record, column: str) -> Any:
    value = record.fields.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{record.where}: column {column} is text that is not JSON; write it as JSON") from None


def _inside(starts: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    """Whether each token begins inside one of the ascending spans."""
    inside = []
    at = 0
    for start in starts:
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        inside.append(at < len(spans) and start >= spans[at][0])
    return inside


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {', '.join(sorted(map(str, value))[:5]) or 'nothing'}"
    return "an empty list" if value == [] else f"a {type(value).__name__}"
