"""Options that `zoo import` and `zoo export` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "stored"]),
        help="type of the written weights; if not given, that of SRC, which must be one (float32 of a run in float64); "
        "'stored': each tensor's own",
    ),
    click.option("--shard-size", metavar="SIZE", default="5GB", show_default=True, help="largest weight file"),
    click.option(
        "--threads",
        type=click.IntRange(1, 64),
        help="threads that read and write; the processors, up to 8, if not given",
    ),
)


def conversion_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
