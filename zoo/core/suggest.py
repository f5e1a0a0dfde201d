"""The nearest of the names that would have worked, for every message that says a name is unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher


def normalised(name: str) -> str:
    """A name as it is compared: lower case, with `-`, `_` and `.` alike."""
    return re.sub(r"[-_.]+", "-", name).lower()


def near(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Known names that a typing error or another spelling turns into `name`, best first; else those it is a part of."""
    wanted = normalised(name)
    ratios = {one: SequenceMatcher(a=wanted, b=normalised(one)).ratio() for one in sorted(known)}
    least = max(0.6, max(ratios.values(), default=0.0) - 0.1)
    close = sorted((one for one in ratios if ratios[one] >= least), key=lambda one: -ratios[one])
    parts = [one for one in ratios if len(wanted) > 2 and wanted in normalised(one)]
    return (close or parts)[:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing when no known name is near."""
    found = near(name, known)
    return f"did you mean {' or '.join(repr(one) for one in found)}?" if found else ""
