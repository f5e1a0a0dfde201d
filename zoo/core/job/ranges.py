"""Which numbers a setting takes, said where the setting is declared and checked where it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """The finite numbers from `low` to `high`; `above` and `below` leave out the ends."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """NaN is in no span."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        low = f"more than {self.low:,}" if self.above else f"at least {self.low:,}"
        high = f"less than {self.high:,}" if self.below else f"at most {self.high:,}"
        return f"{low} and {high}"


COUNT = Span(1, 10**9)
"""Of steps and rows."""
DEGREE = Span(1, 2**20)
"""Of ranks on an axis, or stages."""


def number(default: Any, span: Span, *, usual: Span | None = None) -> Any:
    """Declare a dataclass field that takes the numbers of a span; those outside the `usual` ones are warned about."""
    return field(default=default, metadata={"span": span, "usual": usual})


def degree() -> Any:
    """Declare a field for a degree. One below 1 is left to the check of layouts, which names the nearest that works."""
    return field(default=None, metadata={"span": DEGREE, "least_with_layout": True})
