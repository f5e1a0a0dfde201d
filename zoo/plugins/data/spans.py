"""Where in a rendered conversation a turn stands: what the template writes because of it, header left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from zoo.core.errors import DataError

Span: TypeAlias = tuple[int, int]

PROBE = "\U0010fff1"
"""A private character that stands for what a message says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The turns of one conversation. `render` may raise DataError for what a template refuses."""

    text: str
    """The whole conversation, rendered."""
    messages: Sequence[dict[str, Any]]
    render: Callable[[Sequence[dict[str, Any]], bool], str]
    """The text of messages, with the generation prompt or without."""
    special: Collection[str]

    def span(self, turn: int) -> Span:
        """Return what is generated of a turn: what the model is given before it is the header, its last token the end.

        Most templates add to what they wrote: the turn is what follows the rendering of all before it and of the
        generation prompt. Raises DataError if the template rewrites earlier turns and nothing else helps.
        """
        before, after = self._rendered(turn, prompt=True), self._rendered(turn + 1)
        begins = before is not None and self.text.startswith(before)
        if before is not None and begins and after is not None and self.text.startswith(after):
            return len(before), len(before) + len(self._without_tail(after[len(before) :]))
        start, stop = self._by_difference(turn, before, after)
        return (len(before) if before is not None and begins else start), stop

    def _by_difference(self, turn: int, before: str | None, after: str | None) -> Span:
        """Find a turn where the conversation parts from the same one in which it says something else.

        If what the template adds for the turn at the end of a conversation stands there, it is the turn. Otherwise only
        a turn that its neighbours' own words do not reach into is taken, so those are never trained.
        """
        found = self._changed(turn)
        alone = self._rendered(turn, last=self._probe(turn))
        if found is None or after is None or alone is None:
            raise DataError(_mixed(turn))
        start, stop = found
        added = self._added(turn, before, after, alone)
        at = self.text.find(added, max(0, stop - len(added)), start + len(added)) if added else -1
        if at >= 0:
            return at, at + len(added)
        if self._reaches(turn - 1, start, stop) or self._reaches(turn + 1, start, stop):
            raise DataError(_mixed(turn))
        tail = after[len(after) - _common_end(after, alone) :]
        return start, stop + self._end_of_turn(tail, self.text[stop:])

    def _added(self, turn: int, before: str | None, after: str, alone: str) -> str:
        """Return what the template adds for a turn at the end of a conversation, "" if that cannot be told.

        `before` is the text of what comes before, `after` the one with the turn, `alone` with another in its place.
        """
        if before is not None and after.startswith(before):
            return self._without_tail(after[len(before) :])
        start = _common_start(after, alone)
        shorter = replace(self, text=after, messages=self.messages[: turn + 1])
        return "" if shorter._reaches(turn - 1, start, len(after)) else self._without_tail(after[start:])

    def _reaches(self, other: int, start: int, stop: int) -> bool:
        """Whether what a message says itself reaches into a part of the text."""
        found = self._changed(other) if 0 <= other < len(self.messages) else None
        return found is not None and found[0] < stop and start < found[1]

    def _changed(self, turn: int) -> Span | None:
        """Return the part of the text that is another when a message says something else; None if it is not written."""
        other = self._with_another(turn)
        if other is None or PROBE not in other:
            return None
        start = _common_start(self.text, other)
        return start, max(start, len(self.text) - _common_end(self.text, other))

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

    def _rendered(self, count: int, *, prompt: bool = False, last: dict[str, Any] | None = None) -> str | None:
        """Return the text of the first messages, and of one more; None if the template refuses them."""
        if count == len(self.messages) and not prompt:
            return self.text
        try:
            return self.render([*self.messages[:count], *([] if last is None else [last])], prompt)
        except DataError:
            return None

    def _with_another(self, turn: int) -> str | None:
        """Return the text with another message in a turn's place, if need be one that calls as many tools."""
        for another in (self._probe(turn), _renamed(self.messages[turn])):
            try:
                return self.render([*self.messages[:turn], another, *self.messages[turn + 1 :]], False)
            except DataError:
                continue
        return None

    def _probe(self, turn: int) -> dict[str, Any]:
        message = self.messages[turn]
        kept: dict[str, Any] = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
        return {**kept, "content": PROBE}


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that says and calls something else in the same places."""
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
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[len(one) - middle : len(one) - low] == other[len(other) - middle : len(other) - low]:
            low = middle
        else:
            high = middle - 1
    return low
