"""Where in a rendered conversation a turn stands: what the template writes because of it, header left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
        start, stop = self._by_difference(turn, after)
        return (len(before) if before is not None and begins else start), stop

    def _by_difference(self, turn: int, after: str | None) -> Span:
        """Find a turn where the conversation parts from the same one in which it says something else.

        Only a turn that its neighbours' own words do not reach into is taken, so those are never trained.
        """
        found = self._changed(turn)
        if found is None or after is None:
            raise DataError(_mixed(turn))
        start, stop = found
        for neighbour in (turn - 1, turn + 1):
            other = self._changed(neighbour) if 0 <= neighbour < len(self.messages) else None
            if other is not None and other[0] < stop and start < other[1]:
                raise DataError(_mixed(turn))
        alone = self.render([*self.messages[:turn], self._probe(turn)], False)
        tail = after[len(after) - _common_end(after, alone) :]
        return start, stop + self._end_of_turn(tail, self.text[stop:])

    def _changed(self, turn: int) -> Span | None:
        """Return the part of the text that is another when a message says something else; None if it is not written."""
        other = self.render([*self.messages[:turn], self._probe(turn), *self.messages[turn + 1 :]], False)
        if PROBE not in other:
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

    def _rendered(self, count: int, *, prompt: bool = False) -> str | None:
        """Return the text of the first messages; None if the template wants more of them."""
        if count == len(self.messages) and not prompt:
            return self.text
        try:
            return self.render(self.messages[:count], prompt)
        except DataError:
            return None

    def _probe(self, turn: int) -> dict[str, Any]:
        message = self.messages[turn]
        kept: dict[str, Any] = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
        return {**kept, "content": PROBE}


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
