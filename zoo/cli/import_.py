"""`zoo import`: a checked, self-contained copy of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli.session import Session, pass_session
from zoo.conversion.transfer import open_checked, report, transfer


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@pass_session
def import_(session: Session, source: str, out: Path) -> None:
    """Check the Hugging Face checkpoint SRC (a directory or a hub id) and copy it to the new directory OUT.

    Every tensor must be there once, in the shape its config.json asks for; pickles and code are never read.
    """
    transfer(open_checked(source, session.registry), session.registry.converters.load("hf"), out)
    click.echo(f"import    {report(out)}", err=True)
    click.echo(out)
