"""`zoo export`: a run as a checkpoint that others load."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click

from zoo.cli.conversion_options import conversion_options
from zoo.cli.session import Session, pass_session
from zoo.conversion.hf.push import check_push, push
from zoo.conversion.transfer import open_checked, transfer
from zoo.core.errors import UsageError


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option("--to", "form", default="hf", show_default=True, metavar="FORM", help="form to write, see `zoo plugins`")
@conversion_options
@click.option("--push", "repo", metavar="OWNER/NAME", help="upload it to this repository of the hub afterwards")
@click.option("--private", is_flag=True, help="make that repository private, if there is none yet")
@pass_session
def export(
    session: Session,
    source: str,
    out: Path | None,
    form: str,
    dtype: str | None,
    shard_size: str,
    threads: int | None,
    repo: str | None,
    private: bool,
) -> None:
    """Write SRC (a run, a checkpoint of one, or a checkpoint directory) as a checkpoint that others load.

    OUT defaults to the folder hf/ of the run. Nothing is overwritten; what was written is read back and compared. If it
    is interrupted, the same command completes it.
    """
    if private and not repo:
        raise UsageError("--private says how to push: give --push OWNER/NAME too")
    if repo:
        check_push(repo)
    converter = session.registry.converters.load(form)
    target = out or _default_out(Path(source), form)
    opened = open_checked(source, session.registry)
    done = transfer(opened, converter, target, dtype=dtype, shard_size=shard_size, threads=threads)
    click.echo(f"export    {done}", err=True)
    click.echo(target)
    if repo:
        click.echo(push(target, repo, private=private))


def _default_out(source: Path, form: str) -> Path:
    """The run's own folder, whether the run or a checkpoint of it is named."""
    for run in (source, source.absolute().parent.parent):
        if (run / "checkpoints").is_dir():
            return run / form
    raise UsageError(f"{source} is no run, so say where to write: zoo export {quote(str(source))} --to {form} OUT")
