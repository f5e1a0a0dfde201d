"""What a run says of its rows and of steps that train nothing, as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo.core.errors import DataError
from zoo.core.job.job import Job
from zoo.core.run.feed import Position


def rows_read(position: Position, *, empty_steps: int) -> str:
    """Say what became of the samples up to a position. Nothing is left out in silence."""
    stats, fill = position.stats, 100 * position.fill
    if stats is None:
        return ""
    trained = 100 * stats.trained_tokens / max(1, stats.tokens)
    rows = (
        f"{'rows':<10}{stats.samples:,} samples read into {stats.rows:,} rows, {fill:.1f}% full, {trained:.0f}% "
        f"trained; {stats.split:,} split, {stats.truncated:,} truncated, {stats.dropped:,} dropped, "
        f"{stats.blank:,} blank"
        f"{f'; {stats.unlabelled:,} pieces without a label left out' if stats.unlabelled else ''}"
        f"{f'; {empty_steps:,} steps trained nothing' if empty_steps else ''}"
    )
    return "\n".join([rows, *(f"{'warning':<10}{line}" for line in stats.remarks.lines())])


def first_empty(steps: Sequence[Mapping[str, float | None]]) -> str:
    """Say which of some steps is the first without a trained token."""
    first = next(int(metrics["step"] or 0) for metrics in steps if metrics["loss"] is None)
    return (
        f"warning: no token of step {first} is trained, so it changed nothing and has no loss; such steps are "
        f"counted, and `zoo data check` says what is trained of the data"
    )


def nothing_trained(job: Job) -> DataError:
    """Return the error of a run whose steps all had no trained token."""
    return DataError(
        f"no token was trained in {job.schedule.steps} steps on {job.data.path}, so nothing was saved; "
        f"`zoo data check` shows what --loss-on {job.data.loss_on} leaves to train"
    )
