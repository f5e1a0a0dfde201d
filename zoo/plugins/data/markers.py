"""Special tokens that somebody spelt out in a text, and those that a template writes and the vocabulary lacks."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from zoo import Remark
from zoo.core.tokenizer.tokenizer import GUARD

_SHAPE = r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|<(?:start|end)_of_turn>"
"""What special tokens of chats look like in one vocabulary or another."""

NAMED = 5
"""So many markers are named at a place."""

_SHAPED = re.compile(_SHAPE)


def spelt_in_turns(texts: Iterable[str], rendered: str, special: Collection[str]) -> list[str]:
    """Return what people wrote in a conversation that looks like a special token of this vocabulary or another, sorted.

    Those of this vocabulary are broken by GUARD in the rendering, and only those that were to stay characters.
    """
    foreign = {found for text in texts for found in _SHAPED.findall(text) if found not in special}
    broken = {token for token in special if token[:1] + GUARD + token[1:] in rendered} if GUARD in rendered else set()
    return sorted(foreign | broken)


def spelt_remarks(texts: Iterable[str], ids: Collection[int], special: Mapping[str, int]) -> list[Remark]:
    """Return a remark if texts that became these tokens, without a template, spell out special tokens."""
    pattern = _pattern(tuple(special))
    found = sorted({one for text in texts for one in pattern.findall(text) if special.get(one) not in ids})
    kind = "texts that spell out special tokens, which stay characters; give conversations as column messages"
    return [Remark(kind, named(found))] if found else []


def named(markers: Sequence[str]) -> str:
    """Name the first markers of many."""
    return " ".join([*markers[:NAMED], *(["..."] if len(markers) > NAMED else [])])


def lacking(text: str, offsets: Sequence[tuple[int, int]], *, besides: Collection[str]) -> list[str]:
    """Return the markers in a rendered conversation that became several tokens, but for those in `besides`.

    `offsets` says where each token begins and stops.
    """
    first: dict[str, int] = {}
    for match in _SHAPED.finditer(text):
        first.setdefault(match[0], match.start())
    return [
        marker
        for marker, at in first.items()
        if marker not in besides and bisect_left(offsets, (at + 1,)) < bisect_left(offsets, (at + len(marker),))
    ]


@lru_cache(maxsize=8)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    # Hundreds of reserved tokens have the usual shape, and an alternative each would take its time.
    others = [token for token in special if len(token) > 1 and not _SHAPED.fullmatch(token)]
    return re.compile("|".join([_SHAPE, *map(re.escape, sorted(others, key=len, reverse=True))]))
