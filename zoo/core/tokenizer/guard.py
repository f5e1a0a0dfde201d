"""Special tokens that stand in somebody's text stay text: a private character breaks them, and leaves no token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Encoding

from zoo.core.errors import DataError

GUARD = "\U0010fff0"
"""Breaks a special token that stands in somebody's text. A private character whose bytes (F4 8F ..) no vocabulary
merges with anything, so the tokens made of it can be taken out again without a trace."""

ASSISTANT = "assistant"
"""The role whose messages the model itself would write."""


@dataclass(frozen=True, eq=False)
class Marks:
    """Special tokens, and whose text they are broken in."""

    special: frozenset[str]
    unflagged: frozenset[str]
    """Those that the tokenizer's file does not flag as special, so that it finds them in any text."""
    markup: frozenset[str]
    """Those that a template uses inside turns only (`<think>`): an assistant may write them."""

    def broken_in_text(self, text: str) -> str:
        """Return a text without roles for a tokenizer that reads flagged tokens as text."""
        return _broken(text, self._in_text)

    def broken_in_message(self, message: Any) -> Any:
        """Return a message with all that its author may not write broken in its strings."""
        theirs = isinstance(message, Mapping) and message.get("role") == ASSISTANT
        return self._walked(message, self._in_assistants if theirs else self._in_others)

    def broken_in(self, value: Any) -> Any:
        """Return a value that is no message (tools, documents) with all special tokens broken in its strings."""
        return self._walked(value, self._in_others)

    @cached_property
    def _in_text(self) -> re.Pattern[str]:
        return _any_of(self.unflagged - self.markup)

    @cached_property
    def _in_assistants(self) -> re.Pattern[str]:
        return _any_of(self.special - self.markup)

    @cached_property
    def _in_others(self) -> re.Pattern[str]:
        return _any_of(self.special)

    def _walked(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            check_unguarded(value)
            return _broken(value, pattern)
        if isinstance(value, Mapping):
            return {self._walked(key, pattern): self._walked(item, pattern) for key, item in value.items()}
        return [self._walked(item, pattern) for item in value] if isinstance(value, list | tuple) else value


def counterpart(content: str) -> str:
    """Return what closes a piece of markup, or opens it: `</think>` for `<think>` and the other way round."""
    return content[:1] + content[2:] if content[1:2] == "/" else f"{content[:1]}/{content[1:]}"


def check_unguarded(text: str) -> None:
    """Raise DataError if a text holds the private character itself."""
    if GUARD in text:
        raise DataError("a text holds the character U+10FFF0, which zoo keeps for itself; take it out")


def without_guards(encoding: Encoding, text: str, folded: Mapping[int, str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and places of the tokens of a text, those of its GUARDs left out.

    `folded` are special tokens that a normalizer makes of other characters, too. Raises DataError where it did.
    """
    ids, offsets = list(encoding.ids), encoding.offsets
    for id, (start, stop) in zip(ids, offsets, strict=True) if folded else ():
        written, meant = text[start:stop], folded.get(id)
        if written and meant and meant not in written:
            raise DataError(f"the text holds {written!r}, which this tokenizer reads as {meant!r}; take it out")
    if GUARD not in text:
        return ids, offsets
    kept = []
    for id, (start, stop) in zip(ids, offsets, strict=True):
        if GUARD not in text[start:stop]:
            kept.append((id, (start, stop)))
        elif text[start:stop].strip(GUARD):
            raise DataError(f"this tokenizer cannot keep {text[start:stop].replace(GUARD, '')!r} in two parts")
    return [id for id, _ in kept], [place for _, place in kept]


def _broken(text: str, pattern: re.Pattern[str]) -> str:
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
    return text


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(re.escape(content) for content in longest_first if len(content) > 1) or "(?!)")
