"""A conversation as a sample: rendered by any chat template, with what is trained and what is odd about it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoo import DataError, Record, Remark, Sample, Tokenizer
from zoo.core.tokenizer.tokenizer import GUARD
from zoo.plugins.data.forms import forms, is_unreadable
from zoo.plugins.data.losses import lost
from zoo.plugins.data.markers import lacking, named, spelt_in_turns
from zoo.plugins.data.spans import Span, Turns
from zoo.plugins.data.turns import ASSISTANT, UNTRAINED, Message, arguments_of, described, from_json, is_trained

_OWN_VARIABLES = {"messages", "add_generation_prompt", "self"}
"""What rendering itself gives to a template."""

_UNWANTED = "conversations whose assistant's turns all have weight 0 or train false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages under a tokenizer's template. Errors say `where` the record is."""

    messages: Sequence[Message]
    variables: Mapping[str, Any]
    """What else the template may use: tools, documents."""
    tokenizer: Tokenizer
    where: object
    answers_from: int = 0
    """Index of the first message that may be trained."""

    def sample(self, loss_on: str) -> Sample:
        """Return the tokens, trained on the assistant's turns (`assistant`), the last of them (`last`), or on `all`.

        A turn whose `weight` is 0 or whose `train` is false is never trained. Raises DataError if what is trained
        cannot be told apart.
        """
        said = [i for i, one in enumerate(self.messages) if i >= self.answers_from and one["role"] == ASSISTANT]
        kept = [i for i in said if is_trained(self.messages[i], where=f"{self.where}: message {i + 1}")]
        wanted = {"all": [i for i in said if i not in kept], "last": kept[-1:], "completion": kept[-1:]}
        try:
            sample = self._sample(wanted.get(loss_on, kept), outside=loss_on == "all")
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from None
        except RecursionError:
            raise DataError(f"{self.where}: its messages are nested too deep; take the sample out") from None
        if loss_on == "all" or kept or not said:
            return sample
        return replace(sample, remarks=[Remark(_UNWANTED), *sample.remarks])

    def _sample(self, turns: Sequence[int], *, outside: bool) -> Sample:
        """Train on the turns with these indices, or on all that is outside of them."""
        messages, text = self._form()
        found = Turns(text=text, messages=messages, render=self._render, special=self.tokenizer.special)
        spans = found.spans(turns)
        ids, offsets = self.tokenizer.encode_rendered(text)
        trained = inside(ids, offsets, list(spans.values()), special=set(self.tokenizer.special.values()))
        parts = {turn: text[slice(*span)].replace(GUARD, "") for turn, span in spans.items()}
        losses = lost(messages, text.replace(GUARD, ""), variables=self.variables, turns=parts)
        remarks = [*(loss.remark for loss in losses), *self._remarks(), *self._on_markers(text, offsets)]
        return Sample(ids, [one != outside for one in trained], remarks)

    def _form(self) -> tuple[Sequence[Message], str]:
        """Return the first form of the messages of which the template leaves out the least, and the rendering."""
        best: tuple[int, Sequence[Message], str] | None = None
        refused: DataError | None = None
        for messages in forms(self.messages):
            try:
                text = self._render(messages, False)
            except DataError as error:
                refused = refused or error
                continue
            losses = len(lost(messages, text.replace(GUARD, ""), variables=self.variables, turns={}))
            if best is None or losses < best[0]:
                best = losses, messages, text
            if not losses:
                break
        if best is None:
            assert refused is not None, "there is always a form"
            broken = [i for i, one in enumerate(self.messages, start=1) if any(map(is_unreadable, arguments_of(one)))]
            hint = f"; the arguments of message {broken[0]}'s tool calls are no JSON object" if broken else ""
            raise DataError(f"{refused}{hint}")
        return best[1:]

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        return self.tokenizer.render(messages, add_generation_prompt=prompt, **self.variables)

    def _remarks(self) -> Iterator[Remark]:
        for number, message in enumerate(self.messages, start=1):
            role, place = message["role"], f"message {number}"
            if role != ASSISTANT and role not in UNTRAINED:
                yield Remark(f"turns of role {role[:40]!r}, which is never trained; {ASSISTANT!r} is", place)
            if role != ASSISTANT and message.get("train") is True:
                yield Remark(
                    f"turns that ask for training and are not of role {ASSISTANT!r}, so are not trained", place
                )
            if any(map(is_unreadable, arguments_of(message))):
                yield Remark("tool calls whose arguments are text and no JSON object", place)
            if any(map(_holds_null, arguments_of(message))):
                yield Remark(
                    "tool calls with null among the arguments, as tables fill in for keys that are not there; "
                    "write arguments as JSON text",
                    place,
                )

    def _on_markers(self, text: str, offsets: Sequence[Span]) -> Iterator[Remark]:
        spelt = spelt_in_turns(_texts(self.messages), text, self.tokenizer.special)
        if spelt:
            yield Remark("conversations that spell out special tokens, which stay characters", named(spelt))
        missing = lacking(text, offsets, besides=spelt)
        if missing:
            yield Remark(
                "conversations in which the chat template writes markers that the vocabulary lacks, so that they are "
                "characters; give another template with --chat-template FILE",
                named(missing),
            )


def template_variables(record: Record) -> dict[str, Any]:
    """Columns `tools` and `documents`, and the entries of `chat_template_kwargs`, each as it is or as JSON text.

    Column `functions` is what `tools` were called before. No other column reaches the template: what it is called
    could mean something there. Raises DataError.
    """
    kwargs = _parsed(record, "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DataError(f"{record.where}: column chat_template_kwargs must be an object, not {described(kwargs)}")
    functions = _objects(record, "functions")
    tools = _objects(record, "tools") or [{"type": "function", "function": one} for one in functions or ()]
    given = {"tools": tools or None, "documents": _listed(record, "documents"), **(kwargs or {})}
    return {name: value for name, value in given.items() if value is not None and name not in _OWN_VARIABLES}


def inside(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], *, special: set[int]) -> list[bool]:
    """Whether each token of a text holds a character of one of the spans.

    A token in which the end of a header and the beginning of an answer merge is trained: no other says that beginning.
    A special token is not, though it may swallow white space of the answer: it is the header's.
    """
    result = [False] * len(ids)
    for begin, end in spans:
        first, after = bisect_left(offsets, (begin,)), bisect_left(offsets, (end,))
        result[first:after] = [True] * (after - first)
        while begin < end and first > 0 and offsets[first - 1][1] > begin:
            first -= 1
            result[first] = result[first] or ids[first] not in special
    return result


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (part["text"] for part in content)


def _holds_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))


def _objects(record: Record, column: str) -> list[Any] | None:
    """Return `_listed` of a column whose entries must be objects."""
    found = _listed(record, column)
    for number, one in enumerate(found or (), start=1):
        if not isinstance(one, Mapping):
            what = f"entry {number} of column {column} must be an object, not {described(one)}"
            raise DataError(f"{record.where}: {what}")
    return found


def _listed(record: Record, column: str) -> list[Any] | None:
    """A column that is a list of objects, itself or each of them as JSON text; None if it is empty."""
    value = _parsed(record, column)
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise DataError(f"{record.where}: column {column} must be a list, not {described(value)}")
    return [from_json(one, what=f"{record.where}: an entry of column {column}") for one in value]


def _parsed(record: Record, column: str) -> Any:
    value = record.fields.get(column)
    if isinstance(value, str) and not value.strip():
        return None
    return from_json(value, what=f"{record.where}: column {column}")
