"""The nearest of the names that would have worked, for every message that says a name is unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


def normalised(name: str) -> str:
    """A name as it is compared: lower case, with `-`, `_` and `.` alike."""
    return re.sub(r"[-_.]+", "-", name).lower()


def near(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Up to `limit` known names that a typing error, a short form or another spelling turns into `name`, best first."""
    spelled = {normalised(one): one for one in sorted(known)}
    wanted = normalised(name)
    close = get_close_matches(wanted, spelled, n=limit, cutoff=0.6)
    parts = [one for one in spelled if len(wanted) > 2 and (wanted in one or (len(one) > 2 and one in wanted))]
    return [spelled[one] for one in dict.fromkeys([*close, *parts])][:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing when no known name is near."""
    found = near(name, known)
    return f"did you mean {' or '.join(repr(one) for one in found)}?" if found else ""
