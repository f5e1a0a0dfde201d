"""`zoo finetune`: train."""

from __future__ import annotations

from typing import Any

import click

from zoo.cli.job_options import job_options
from zoo.core.machine.launcher_env import speaks
from zoo.core.registry.loading import Plugins


@click.command()
@job_options
@click.pass_obj
def finetune(plugins: Plugins, /, model: str | None, **flags: Any) -> None:
    """Fine-tune MODEL (a family: `zoo models`). The same command resumes a run that was stopped."""
    from zoo.core import api  # noqa: PLC0415  (torch, which `--help` does without)

    path = api.run(plugins, model, flags, say=lambda line: click.echo(line, err=True))
    if speaks():
        click.echo(path)
