"""What a run would refuse once its ranks have started, asked before: by `plan` as well as by `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.core import finished
from zoo.core.errors import DataError, UsageError
from zoo.core.inventory import checked_book, meta_model
from zoo.core.prepare import Prepared
from zoo.core.registry import Registry


def check_start(prepared: Prepared, registry: Registry) -> None:
    """Open what a run opens: the tokenizer, the weights' names, the data, the checkpoint it goes on from.

    Nothing is computed, and one sample is read. Raises UsageError or DataError.
    """
    saved = finished.resume_point(prepared.out, prepared.job.checkpoint.resume)
    if prepared.source is not None:
        checked_book(prepared.source, prepared.spec, prepared.config)
    stream = prepared.open_rows(registry)
    try:
        # A run that has all its steps is only said to be done, whatever became of its data.
        if finished.is_done(saved, prepared.out, prepared.job.schedule.steps):
            return
        stream.check_first()
        if saved is not None:
            stream.load_state_dict(checked_progress(saved, prepared)["cursor"])
    finally:
        stream.close()


def checked_progress(saved: Path, prepared: Prepared) -> dict[str, Any]:
    """Return what a checkpoint says of itself, if this job can go on from it. Raises UsageError or DataError."""
    progress = finished.resumable_progress(saved)
    for key, now in (("seq", prepared.job.data.seq), ("global_batch", prepared.global_batch)):
        if progress[key] != now:
            raise UsageError(
                f"{saved} was trained with {key} {progress[key]} and this job has {now}: the data position would not "
                f"hold. Give --{key.replace('_', '-')} {progress[key]}, or start a new run with --out elsewhere"
            )
    _check_model(saved, progress.get("model", {}), prepared)
    return progress


def _check_model(saved: Path, fields: dict[str, Any], prepared: Prepared) -> None:
    """Raise DataError if the weights of a checkpoint are not those of the job's model, by the config they had."""
    changed = [key for key, value in prepared.hub_config.items() if key in fields and fields[key] != value]
    if not changed:
        return
    spec = prepared.spec
    shapes = [
        {name: parameter.shape for name, parameter in meta_model(spec, config).named_parameters()}
        for config in (spec.parse(fields), prepared.config)
    ]
    if shapes[0] != shapes[1]:
        what = ", ".join(f"{key} {fields[key]} and not {prepared.hub_config[key]}" for key in changed[:3])
        raise DataError(
            f"{saved} was saved for another model: {what}; give the settings it had, or start a new run with "
            f"--out elsewhere"
        )
