"""Numbers as people write and read them: `64k` tokens, `80GiB`, `1h09m`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zoo.core.errors import UsageError

_TOKENS = re.compile(r"^(\d+(?:\.\d+)?)([kmKM]?)$")
_FACTOR = {"": 1, "k": 1024, "m": 1024**2}


def parse_tokens(text: str | int, *, name: str = "--seq") -> int:
    """`64k` is 65,536 and `1M` is 1,048,576. Raises UsageError."""
    match = _TOKENS.match(str(text).strip())
    value = float(match[1]) * _FACTOR[match[2].lower()] if match else 0.0
    if not 1 <= value < 2**53 or value != int(value):
        raise UsageError(f"{name} {text}: not a number of tokens; write a whole number, or one like 64k (65,536) or 1M")
    return int(value)


def format_tokens(count: int) -> str:
    """65536 as `64k`; numbers that are not whole multiples stay as they are."""
    for unit, factor in (("M", 1024**2), ("k", 1024)):
        if count % factor == 0 and count:
            return f"{count // factor}{unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """As `42s`, `3m05s` or `1h09m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_duration(seconds: float) -> str:
    """Less than a minute as `12 us`, `3.1 ms` or `4.2 s`; more as `format_seconds`."""
    if seconds >= 60:
        return format_seconds(seconds)
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_bytes(count: float) -> str:
    """As `235 MB` or `1.2 GB`, in powers of ten as links are rated."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """8030261248 as `8.03B`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f}{unit}"
    return f"{count:.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, no trailing blanks, `-` for what is empty."""
    lines = [list(header), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
