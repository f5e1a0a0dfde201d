"""JSON from elsewhere: one reading only, and bounded before Python's parser takes memory for it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from zoo import DataError

MAX_DEPTH = 16
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(text: bytes, place: str, *, values: int, containers: int) -> dict[str, Any]:
    """An object of at most about so many values, objects and lists. Raises DataError that starts with `place`.

    Refused although many parsers take it: a name twice in an object (which one counts?), NaN and Infinity, written or
    by overflow (no JSON), lone halves of a character (cannot be written), and nesting beyond MAX_DEPTH (indenting it
    takes the square).
    """
    # Between values stands a comma, so counting bytes bounds what the parser will allocate. Those inside of strings
    # count too: nothing that a checkpoint needs comes near.
    if text.count(b",") > values or text.count(b"[") + text.count(b"{") > containers:
        raise DataError(f"{place} holds more JSON than allowed: {values} values, {containers} objects and lists")
    try:
        found = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError as error:
        raise DataError(f"{place} is no valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise DataError(f"{place} is no JSON object")
    _check_depth(found, place)
    if _SURROGATE.search(text):
        _check_characters(found, place)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, count in names.items() if count > 1)
        raise ValueError(f"{twice[:80]!r} appears twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:80]} is not allowed: no float is that large")
    return number


def _check_depth(found: object, place: str) -> None:
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise _too_deep(place)


def _inner(value: object) -> Iterator[object]:
    """The objects and lists in one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in inner if isinstance(item, dict | list))


def _check_characters(found: dict[str, Any], place: str) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place} is no valid JSON: a string has half a character (a lone surrogate)") from None


def _too_deep(place: str) -> DataError:
    return DataError(f"{place} is no valid JSON here: nested deeper than {MAX_DEPTH} levels")
