"""Strict reading of a config.json's fields: type, range and the word to look for when one is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo import DataError

_MAX_TOKEN = (1 << 31) - 1
_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one JSON object of config.json, read one by one. Every method raises DataError."""

    values: Mapping[str, Any]
    where: str = "config.json"

    def wrong(self, name: str, rule: str) -> DataError:
        return DataError(f"{self.where}: {name} is {self.values.get(name)!r:.80}: {rule}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null, which the hub treats alike."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int, *, low: int = 1, high: int) -> int:
        value = self.values[name] if self.has(name) else default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number as a float: transformers 5 refuses integers where it expects floats."""
        value = self.values[name] if self.has(name) else default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "it must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not low <= number <= high:
            raise self.wrong(name, f"it must be a finite number from {low:g} to {high:g}")
        return number

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values[name] if self.has(name) else default
        if not isinstance(value, bool):
            raise self.wrong(name, "it must be true or false")
        return value

    def fixed(self, name: str, *allowed: Any, hint: str = "") -> None:
        """A field that changes the model in a way this family does not implement, unless it is one of these."""
        if self.has(name) and self.values[name] not in allowed:
            rule = f"this family supports only {' or '.join(map(repr, allowed))}"
            raise self.wrong(name, f"{rule}; {hint}" if hint else rule)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, or {} where the field is absent or null."""
        value = self.values[name] if self.has(name) else {}
        if not isinstance(value, dict):
            raise self.wrong(name, "it must be an object or null")
        return value

    def token(self, name: str, default: int | None) -> int | None:
        """A token id or null. It may lie outside the vocabulary: no weight depends on it."""
        value = self.values.get(name, default)
        return None if value is None else self.integer(name, value, low=-1, high=_MAX_TOKEN)

    def tokens(self, name: str, default: int | None) -> int | tuple[int, ...] | None:
        """A token id, a list of them, or null."""
        value = self.values.get(name, default)
        if not isinstance(value, list):
            return self.token(name, default)
        if len(value) > _MAX_TOKENS or not all(_is_token(item) for item in value):
            raise self.wrong(name, f"it must be a list of at most {_MAX_TOKENS} token ids")
        return tuple(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN
