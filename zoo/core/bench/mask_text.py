"""Masks as people type them: `causal`, `window:4096`, `documents:2k+window:1k`, for a row of any length."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from zoo.core.errors import DataError, UsageError, did_you_mean
from zoo.core.humanize import format_tokens, parse_tokens
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import Ranges

SPREAD = 1.2
"""Standard deviation of the logarithm of drawn document lengths: source files and web pages have 1 to 1.5."""
_FORMS = "causal, full, window:4096, prefix:1k, documents:2k (mean length), documents:FILE (a length a line)"
_WORDS = ("causal", "full", "window", "prefix", "documents")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskWords:
    """What a token sees, said for no length in particular."""

    text: str
    causal: bool = True
    window: int | None = None
    prefix: int | None = None
    documents: int | tuple[int, ...] | None = None
    """Mean length of drawn documents, or their lengths, from the first again when the row is longer; None is one."""

    @classmethod
    def parse(cls, text: str) -> MaskWords:
        """Words joined by `+`. Raises UsageError for what is no mask, DataError for a file without lengths."""
        said: dict[str, object] = {}
        for word in text.split("+"):
            name, colon, value = (part.strip() for part in word.partition(":"))
            if name not in _WORDS or bool(colon) != (name not in ("causal", "full")):
                hint = did_you_mean(name, _WORDS)
                raise UsageError(f"--mask {text}: '{word}' is no mask{f' ({hint})' if hint else ''}; one is {_FORMS}")
            meaning = _meaning(name, value)
            if meaning.keys() & said.keys():
                raise UsageError(f"--mask {text}: '{word}' contradicts what stands before it; name one of them")
            said |= meaning
        if not said.get("causal", True) and {"window", "prefix"} & said.keys():
            raise UsageError(f"--mask {text}: full shows everything; a window or a prefix is of a causal mask")
        if {"window", "prefix"} <= said.keys():
            raise UsageError(f"--mask {text}: a window and a prefix cannot be combined; name one of them")
        return cls(text=text, **said)  # type: ignore[arg-type]

    def mask(self, length: int, *, seed: int = 0) -> Mask:
        """The mask of a row of so many tokens. Documents are drawn log-normal, or as given; the row cuts the last."""
        documents = tuple(self._documents(length, seed))
        prefixes = () if self.prefix is None else tuple(min(self.prefix, b - a) for a, b in documents)
        return Mask(length, documents, self.causal, self.window, prefixes)

    @property
    def drawn(self) -> bool:
        """Whether the seed matters."""
        return isinstance(self.documents, int)

    def describe(self, mask: Mask) -> str:
        """As `documents:2k: 31 documents in a row of 64k tokens`."""
        number = len(mask.documents)
        row = f"{number} document{'s' * (number != 1)} in a row of {format_tokens(mask.length)} tokens"
        return f"{self.text}: {row}"

    def _documents(self, length: int, seed: int) -> Ranges:
        found, at = [], 0
        sizes = self._sizes(length, seed)
        while at < length:
            stop = min(at + next(sizes), length)
            found.append((at, stop))
            at = stop
        return tuple(found)

    def _sizes(self, length: int, seed: int) -> Iterator[int]:
        if not isinstance(self.documents, int):
            yield from cycle(self.documents or (length,))
            return
        rng, middle = random.Random(seed), math.log(self.documents) - SPREAD**2 / 2
        while True:
            yield max(1, round(rng.lognormvariate(middle, SPREAD)))


def _meaning(name: str, value: str) -> dict[str, object]:
    if name in ("causal", "full"):
        return {"causal": name == "causal"}
    if name in ("window", "prefix"):
        return {name: parse_tokens(value, name=f"--mask {name}")}
    # One key for both, so that either contradicts the other.
    if value[:1].isdigit() and not Path(value).exists():
        return {"documents": parse_tokens(value, name="--mask documents")}
    return {"documents": _lengths_in(Path(value))}


def _lengths_in(path: Path) -> tuple[int, ...]:
    try:
        words = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--mask documents:{path}: cannot read it ({type(error).__name__}); give a mean length, as documents:2k, "
            f"or a text file with one length a line"
        ) from None
    wrong = next((word for word in words if not word.isdecimal() or not int(word)), None)
    if wrong is not None or not words:
        said = f"'{wrong[:40]}' is no length" if wrong is not None else "it is empty"
        raise DataError(f"--mask documents:{path}: {said}; the file holds one whole number of tokens a line")
    return tuple(map(int, words))
