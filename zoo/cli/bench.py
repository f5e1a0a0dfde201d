"""`zoo bench attention`: what every context scheme would cost one layer, and on real ranks does."""

from __future__ import annotations

import json
from typing import Any

import click

from zoo.cli.chart import check_chart, draw_chart
from zoo.cli.session import Session, pass_session


@click.group()
def bench() -> None:
    """Compare what can be chosen, by its plan and on this machine."""


@bench.command()
@click.argument("model", required=False)
@click.option("--size", metavar="NAME", help="size of the family, see `zoo models`")
@click.option("--heads", type=click.IntRange(min=1), metavar="N", help="query heads, instead of the model's")
@click.option("--kv-heads", type=click.IntRange(min=1), metavar="N", help="key/value heads")
@click.option("--head-dim", type=click.IntRange(min=1), metavar="N", help="numbers of a head")
@click.option("--seq", default="64k", show_default=True, metavar="TOKENS", help="global length of a row")
@click.option("--cp", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="ranks that share it")
@click.option(
    "--mask",
    "mask_text",
    default="causal",
    show_default=True,
    metavar="MASK",
    help="causal, full, window:4096, prefix:1k, documents:2k (mean of drawn lengths) or documents:FILE (a length a "
    "line); joined by +",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="of drawn document lengths")
@click.option("--cp-scheme", "schemes", metavar="NAMES", help="schemes, separated by commas; all if not given")
@click.option("--attn", default="auto", show_default=True, metavar="NAME", help="attention kernel")
@click.option(
    "--balance", default="auto", show_default=True, metavar="HOW", help="how rows are cut, as layout.cp_balance"
)
@click.option("--dtype", default="auto", show_default=True, metavar="TYPE", help="float32, bfloat16 or float64")
@click.option("--measure", is_flag=True, help="also time the schemes on ranks of this machine")
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="ranks to time with; as many as fit, up to --cp")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="turns to time")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every figure.")
@click.option("--plot", "chart", metavar="FILE.png", help="draw bytes and seconds; needs pip install 'zoo[plot]'")
@pass_session
def attention(session: Session, /, as_json: bool, chart: str | None, **options: Any) -> None:
    """Compare context schemes for one attention layer of MODEL (or of --heads): work, balance, bytes, time."""
    from zoo.cli import bench_report  # noqa: PLC0415  (torch, which `--help` does without)
    from zoo.core.bench.compare import answer as answered  # noqa: PLC0415  (torch, which `--help` does without)

    if chart is not None:
        check_chart(chart)
    answer = answered(session.registry, say=lambda line: click.echo(line, err=True), **options)
    plain = bench_report.as_plain(answer)
    click.echo(json.dumps(plain, indent=2) if as_json else "\n".join(bench_report.lines(answer)))
    if chart is not None:
        draw_chart(plain, chart)
        click.echo(f"chart in {chart}", err=True)
