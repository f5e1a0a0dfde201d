"""What a run that goes on must have in common with the one that saved: what cannot change within a run is refused.

Everything else of a command takes effect when it is resumed: optimizer, schedule, layout, memory, kernels, dtype.
What is read of the data is compared by the row stream itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from zoo.core.errors import UsageError
from zoo.core.job.job import Job
from zoo.core.model.inventory import meta_model
from zoo.core.plan.prepared import Prepared
from zoo.core.storage.finished import resumable_progress


def same_run(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint says of the run it is of, for `check_same_run`."""
    return {
        "seq": prepared.job.data.seq,
        "global_batch": prepared.layout.global_batch,
        "model": prepared.hub_config,
        "from": _source(prepared.job),
    }


def checked_progress(saved: Path, prepared: Prepared) -> dict[str, Any]:
    """Return what a checkpoint says of itself, if this job can go on from it. Raise UsageError or DataError."""
    progress = resumable_progress(saved)
    check_same_run(saved, progress, prepared)
    return progress


def check_same_run(saved: Path, progress: Mapping[str, Any], prepared: Prepared) -> None:
    """Raise UsageError if a command says anew what a run that goes on from `saved` could not use."""
    job = prepared.job
    found = chain(
        _family(progress, prepared),
        _rows(progress, prepared),
        _source_differs(progress, job),
        _shape(progress, prepared),
    )
    for was, hint in found:
        anew = "leave out --resume" if job.checkpoint.resume != "auto" else "give another --out"
        raise UsageError(f"{saved} {was}; {hint}, or {anew} to start a new run")


def _rows(progress: Mapping[str, Any], prepared: Prepared) -> Iterator[tuple[str, str]]:
    now = same_run(prepared)
    for key in ("seq", "global_batch"):
        if progress[key] != now[key]:
            yield (
                f"was trained with {key} {progress[key]} and this job has {now[key]}: the data position would not hold",
                f"give --{key.replace('_', '-')} {progress[key]}",
            )


def _source_differs(progress: Mapping[str, Any], job: Job) -> Iterator[tuple[str, str]]:
    """Weights come from the checkpoint, so those of another `--from` would not be read."""
    if "from" not in progress or progress["from"] == _source(job):
        return
    was = progress["from"]
    moved = was is not None and Path(was).is_absolute() and not Path(was).exists()
    if not moved:
        hint = f"give --from {quote(was)}" if was is not None else "leave out --from"
        yield f"began from {was or 'the weights of its size'} and goes on with its own weights, not with --from's", hint


def _family(progress: Mapping[str, Any], prepared: Prepared) -> Iterator[tuple[str, str]]:
    was, now = progress["model"]["model_type"], prepared.hub_config["model_type"]
    if was != now:
        yield f"holds a model of type {was}, and this job trains one of type {now}", "name the family it is of"


def _shape(progress: Mapping[str, Any], prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Fields that decide about names and shapes of weights; others, RoPE's for one, may change."""
    was, now = progress["model"], prepared.hub_config
    if was == now or _shapes(prepared, prepared.spec.parse(was)) == _shapes(prepared, prepared.config):
        return
    changed = {key: value for key, value in was.items() if value != now.get(key)}
    said = ", ".join(f"{key} {value} where this job has {now.get(key)}" for key, value in changed.items())
    hint = " ".join(f"--set model.{key}={str(value).lower()}" for key, value in changed.items())
    yield f"holds weights of another shape: {said}", f"give {hint}"


def _shapes(prepared: Prepared, config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in meta_model(prepared.spec, config).named_parameters()}


def _source(job: Job) -> str | None:
    """What `--from` means wherever the command is typed."""
    source = job.model.source
    return str(Path(source).resolve()) if source and Path(source).exists() else source
