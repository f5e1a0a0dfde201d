"""The options that `zoo plan` and `zoo finetune` share, made from core's table of flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from zoo.core.job.flags import FLAGS


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add MODEL, every job flag, `-c`, and `--set` to a command."""
    for flag in reversed(FLAGS):
        kind: dict[str, Any] = {"is_flag": True} if flag.switch else {"metavar": flag.metavar}
        command = click.option(f"--{flag.name}", flag.keyword, default=None, help=flag.help, **kind)(command)
    command = click.option(
        "--set", "set", multiple=True, metavar="KEY=VALUE", help="any setting, as section.key=value; repeatable"
    )(command)
    command = click.option(
        "-c", "c", default=None, metavar="FILE", help="YAML file of settings, as a run's config.yaml"
    )(command)
    return click.argument("model", required=False)(command)
