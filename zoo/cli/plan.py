"""`zoo plan`: what a job would do, checked, without starting it."""

from __future__ import annotations

import json
from typing import Any

import click

from zoo.cli.job_options import job_options
from zoo.core.plugins import Plugins


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="the resolved job and the reasons as JSON")
@click.pass_obj
def plan(plugins: Plugins, /, model: str | None, as_json: bool, **flags: Any) -> None:
    """Resolve and check a job: model, kernel, scheme, layout, memory policy, and why. Starts nothing."""
    from zoo.core import api  # noqa: PLC0415  (torch, which `--help` does without)

    prepared = api.ready(plugins, model, flags)
    if as_json:
        click.echo(json.dumps({"job": prepared.job.settings(), "notes": dict(prepared.notes)}, indent=2, default=str))
    else:
        click.echo("\n".join(api.head(prepared)))
