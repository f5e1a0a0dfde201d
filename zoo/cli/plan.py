"""`zoo plan`: what a job would do, checked, without starting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from zoo.cli.job_options import job_options
from zoo.core.errors import UsageError
from zoo.core.registry.loading import Plugins


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="the resolved job and the reasons as JSON")
@click.option("--traffic", is_flag=True, help="what a rank sends in a step, by collective and group")
@click.option("--layout-only", is_flag=True, help="draw the mesh: which rank sits in which group; needs no data")
@click.option("--svg", default=None, metavar="FILE", help="with --layout-only: as a picture too")
@click.option("--nodes", default=None, type=click.IntRange(1), metavar="N", help="with --layout-only: machines to fill")
@click.option(
    "--gpus-per-node", default=8, type=click.IntRange(1), metavar="G", help="with --layout-only: ranks of a machine"
)
@click.option(
    "--gpu-memory",
    default=80.0,
    type=click.FloatRange(1.0),
    metavar="GB",
    help="with --layout-only --layout auto: memory of each",
)
@click.pass_obj
def plan(
    plugins: Plugins,
    /,
    model: str | None,
    as_json: bool,
    traffic: bool,
    layout_only: bool,
    svg: str | None,
    nodes: int | None,
    gpus_per_node: int,
    gpu_memory: float,
    **flags: Any,
) -> None:
    """Resolve and check a job: model, kernel, scheme, layout, memory policy, and why. Starts nothing."""
    # They import torch, which `--help` does without.
    from zoo.core import api  # noqa: PLC0415
    from zoo.core.plan.job_plan import job_plan  # noqa: PLC0415

    if layout_only:
        text, picture = api.layout(
            plugins, model, flags, nodes=nodes, gpus_per_node=gpus_per_node, gpu_memory=gpu_memory
        )
        if svg is not None:
            _write(Path(svg), picture)
        click.echo(text)
        return
    if svg is not None or nodes is not None:
        raise UsageError("--svg and --nodes draw the mesh; give --layout-only too")
    planned = job_plan(api.ready(plugins, model, flags), traffic=traffic)
    click.echo(json.dumps(planned.to_dict(), indent=2) if as_json else str(planned))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"--svg {path}: {error.strerror}") from None
