"""`zoo import`: a checked, self-contained copy of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli.conversion_options import conversion_options
from zoo.cli.session import Session, pass_session
from zoo.conversion.compare import compare
from zoo.conversion.transfer import open_checked, transfer


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@conversion_options
@click.option(
    "--verify", is_flag=True, help="compare checksums of all tensors of SRC and OUT; an OUT that is there stays"
)
@pass_session
def import_(
    session: Session,
    source: str,
    out: Path,
    dtype: str | None,
    shard_size: str,
    threads: int | None,
    verify: bool,
) -> None:
    """Check the Hugging Face checkpoint SRC (a directory or a hub id) and copy it to the new directory OUT.

    Every tensor must be there once, in the shape its config.json asks for; pickles and code are never read. If it is
    interrupted, the same command completes it.
    """
    opened = open_checked(source, session.registry)
    if not verify or not (out.is_dir() and any(out.iterdir())):
        converter = session.registry.converters.load("hf")
        done = transfer(opened, converter, out, dtype=dtype, shard_size=shard_size, threads=threads)
        click.echo(f"import    {done}", err=True)
    if verify:
        done = compare(opened, open_checked(str(out), session.registry), dtype=dtype, threads=threads)
        click.echo(f"verify    {done}", err=True)
    click.echo(out)
