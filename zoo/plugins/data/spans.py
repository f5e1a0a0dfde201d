"""Where in a rendered conversation turns stand: what the template writes because of them, their headers left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from zoo import DataError
from zoo.plugins.data.turns import Message

Span: TypeAlias = tuple[int, int]

PROBE = "\U0010fff1"
"""A private character that stands for what a message says."""


@dataclass(frozen=True, slots=True)
class _Beginnings:
    """What is known of a turn by rendering the conversation up to it."""

    start: int | None
    """Where it starts, if the text begins with all that comes before it and the generation prompt."""
    stop: int | None
    """Where it stops, if the text begins with all up to it."""
    added: str | None
    """What the template adds for it at the end of a conversation, if it does add."""
    closing: str
    """The special token that the prompt for it ends in, if it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The turns of one conversation. `render` may raise DataError for what a template refuses."""

    text: str
    """The whole conversation, rendered."""
    messages: Sequence[Message]
    render: Callable[[Sequence[Message], bool], str]
    """The text of messages, with the generation prompt or without."""
    special: Collection[str]

    def spans(self, turns: Sequence[int]) -> dict[int, Span]:
        """Return what is generated of each turn: the model is given its header, and its last token is its end.

        Most templates only ever add: a turn is what follows the rendering of all before it and of the generation
        prompt. Others are asked what changes in the text if the turn says something else. Raises DataError if neither
        tells a turn apart.
        """
        known = {turn: self._beginnings(turn) for turn in turns}
        rewritten = [turn for turn, one in known.items() if one.start is None or one.stop is None]
        bodies = self._bodies(rewritten) if rewritten else {}
        return {turn: self._span(turn, one, bodies.get(turn)) for turn, one in known.items()}

    def _span(self, turn: int, known: _Beginnings, body: Span | None) -> Span:
        if known.start is not None and known.stop is not None:
            return known.start, max(known.start, known.stop)
        if body is None or (known.stop is None and known.added is None):
            body, known = self._by_difference(turn, known)
        at = self._placed(known.added, body)
        if at is not None:
            return at
        start = _header(self.text, body[0], known.closing) if known.start is None else known.start
        if known.stop is not None:
            return start, known.stop
        # What ends the turn at the end of a conversation ends it here.
        closing = self._closing(turn, self.text[slice(*body)], known.added or "")
        if closing is None:
            raise DataError(_mixed(turn))
        return start, body[1] + self._end_of_turn(closing, self.text[body[1] :])

    def _closing(self, turn: int, said: str, added: str) -> str | None:
        """Return what the template writes behind the words of a turn at the end of a conversation; None if unknown.

        The words may be in its own, as `end` is in `<|end|>`, so it is asked where others would stand.
        """
        alone = self._rendered([*self.messages[:turn], _probe(self.messages[turn])])
        closing = self._without_tail((alone or "").rpartition(PROBE)[2])
        if added.endswith(said + closing):
            return closing
        place = added.rfind(said)
        return None if place < 0 else added[place + len(said) :]

    def _beginnings(self, turn: int) -> _Beginnings:
        before, after = self._rendered(self.messages[:turn], prompt=True), self._rendered(self.messages[: turn + 1])
        if turn == 0 and before == self._rendered(()):
            before = None  # some templates write no prompt before anybody has spoken
        start = stop = added = None
        closing = next((token for token in self.special if before is not None and before.endswith(token)), "")
        if before is not None and self.text.startswith(before):
            start = len(before)
        if after is not None and self.text.startswith(after):
            stop = len(self._without_tail(after))
        if before is not None and after is not None and after.startswith(before):
            added = self._without_tail(after[len(before) :])
        return _Beginnings(start, stop, added, closing)

    def _bodies(self, turns: Sequence[int]) -> dict[int, Span]:
        """Find what these turns say by one rendering in which they all say something else; {} if that is not certain.

        What is between the turns must stand in the text as it does there, and hold a special token, which no message
        holds: so it is found nowhere else, and what others say is between the turns and never in one.
        """
        other = self._rendered([_probe(m) if i in turns else m for i, m in enumerate(self.messages)])
        between = other.split(PROBE) if other is not None else []
        if len(between) != len(turns) + 1 or not self.text.startswith(between[0]):
            return {}
        found: dict[int, Span] = {}
        start = len(between[0])
        for turn, part in zip(turns, between[1:], strict=True):
            last = len(found) == len(turns) - 1
            stop = len(self.text) - len(part) if last else self.text.find(part, start)
            if stop < start or not self.text.startswith(part, stop) or not any(one in part for one in self.special):
                return {}
            found[turn] = (start, stop)
            start = stop + len(part)
        return found

    def _by_difference(self, turn: int, known: _Beginnings) -> tuple[Span, _Beginnings]:
        """Find what one turn says where the text parts from the one in which it says something else.

        Only a turn that its neighbours' own words do not reach into is taken, so those are never trained.
        """
        body, after = self._changed(turn), self._rendered(self.messages[: turn + 1])
        alone = self._rendered([*self.messages[:turn], _probe(self.messages[turn])])
        if body is None or after is None or alone is None:
            raise DataError(_mixed(turn))
        if known.added is None:
            start = _header(after, _common_start(after, alone), known.closing)
            shorter = replace(self, text=after, messages=self.messages[: turn + 1])
            if shorter._reaches(turn - 1, (start, len(after))):
                raise DataError(_mixed(turn))
            known = replace(known, added=self._without_tail(after[start:]))
        if self._placed(known.added, body) is None and any(self._reaches(turn + by, body) for by in (-1, 1)):
            raise DataError(_mixed(turn))
        return body, known

    def _placed(self, added: str | None, body: Span) -> Span | None:
        """Return where around a body stands what the template adds for the turn at the end of a conversation."""
        if not added:
            return None
        at = self.text.find(added, max(0, body[1] - len(added)), body[0] + len(added))
        return (at, at + len(added)) if at >= 0 else None

    def _changed(self, turn: int) -> Span | None:
        """Return the part of the text that is another when a message says something else; None if it is not written."""
        for another in (_probe(self.messages[turn]), _renamed(self.messages[turn])):
            other = self._rendered([*self.messages[:turn], another, *self.messages[turn + 1 :]])
            if other is not None:
                break
        if other is None or PROBE not in other:
            return None
        start = _common_start(self.text, other)
        return start, max(start, len(self.text) - _common_end(self.text, other))

    def _reaches(self, other: int, part: Span) -> bool:
        """Whether what a message says itself reaches into a part of the text."""
        found = self._changed(other) if 0 <= other < len(self.messages) else None
        return found is not None and found[0] < part[1] and part[0] < found[1]

    def _end_of_turn(self, tail: str, rest: str) -> int:
        """Return how many characters of the rest end a turn after which the template writes `tail` at the very end."""
        same = _common_start(tail, rest)
        if same == len(tail):
            return len(self._without_tail(tail))
        # The two part somewhere behind the end of the turn, perhaps in the middle of the next header.
        ends = [tail.find(token) + len(token) for token in self.special if token in tail[:same]]
        return min(ends, default=0)

    def _without_tail(self, said: str) -> str:
        """Without white space after a special token: generation ends with that token, so nothing says the rest."""
        stripped = said.rstrip()
        return stripped if any(stripped.endswith(token) for token in self.special) else said

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """Return the text of messages; None if the template refuses them."""
        if len(messages) == len(self.messages) and not prompt and messages == self.messages:
            return self.text
        try:
            return self.render(messages, prompt)
        except DataError:
            return None


def _header(text: str, start: int, closing: str) -> int:
    """Return where the header before a body ends: at the special token that ends the prompt, if there is one.

    The blank behind it is the model's to write then, as in `[/INST] answer`.
    """
    header = text[:start].rstrip()
    return len(header) if closing and header.endswith(closing) else start


def _probe(message: Message) -> dict[str, Any]:
    kept: dict[str, Any] = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
    return {**kept, "content": PROBE}


def _renamed(message: Message) -> dict[str, Any]:
    """Return a message that says something else and calls as many tools, for templates that count them."""
    calls = [
        {**call, "function": {**call["function"], "name": PROBE}} if "function" in call else {**call, "name": PROBE}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "content": message["content"] and PROBE, **({"tool_calls": calls} if calls else {})}


def _mixed(turn: int) -> str:
    return (
        f"the chat template writes the conversation before or in message {turn + 1} differently when more follows, so "
        "what the assistant says there cannot be told apart; type --loss-on last or all, or give another template with "
        "--chat-template FILE"
    )


def _common_start(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return _alike(min(len(one), len(other)), lambda low, high: one[low:high] == other[low:high])


def _common_end(one: str, other: str) -> int:
    a, b = len(one), len(other)
    return _alike(min(a, b), lambda low, high: one[a - high : a - low] == other[b - high : b - low])


def _alike(limit: int, same: Callable[[int, int], bool]) -> int:
    """Return the largest n up to which all is alike, by halves."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if same(low, middle) else (low, middle - 1)
    return low
