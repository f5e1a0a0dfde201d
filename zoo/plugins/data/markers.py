"""Special tokens that somebody spelt out in a text, and those that a template writes and the vocabulary lacks."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from zoo.core.formats import Remark
from zoo.core.tokenizer import Tokenizer

_SHAPE = r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|<(?:start|end)_of_turn>"
"""What special tokens of chats look like in one vocabulary or another."""

_SHAPED = re.compile(_SHAPE)


def spelt_out(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Return what in the texts looks like a special token, of this vocabulary or another; each once, sorted."""
    pattern = _pattern(tuple(tokenizer.special))
    return sorted({found for text in texts for found in pattern.findall(text)})


def spelt_remarks(texts: Iterable[str], tokenizer: Tokenizer) -> list[Remark]:
    """Return a remark if texts that no template writes spell out special tokens."""
    found = spelt_out(texts, tokenizer)
    kind = "texts that spell out special tokens, which stay characters; give conversations as column messages"
    return [Remark(kind, " ".join(found))] if found else []


def lacking(text: str, starts: Sequence[int], *, besides: Collection[str]) -> list[str]:
    """Return the markers in a rendered conversation that became several tokens, but for those in `besides`.

    `starts` says where each token begins.
    """
    first: dict[str, int] = {}
    for match in _SHAPED.finditer(text):
        first.setdefault(match[0], match.start())
    return [
        marker
        for marker, at in first.items()
        if marker not in besides and bisect_right(starts, at) < bisect_left(starts, at + len(marker))
    ]


@lru_cache(maxsize=8)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    # Hundreds of reserved tokens have the usual shape, and an alternative each would take its time.
    others = [token for token in special if len(token) > 1 and not _SHAPED.fullmatch(token)]
    return re.compile("|".join([_SHAPE, *map(re.escape, sorted(others, key=len, reverse=True))]))
