"""What a run would refuse once its ranks have started, asked before: by `plan` as well as by `finetune`."""

from __future__ import annotations

from zoo.core.errors import ZooError
from zoo.core.model.inventory import checked_book
from zoo.core.plan.prepared import Prepared
from zoo.core.registry.decisions import Registry
from zoo.core.run.resume import checked_progress
from zoo.core.run.run_lock import require_free
from zoo.core.storage import finished


def check_start(prepared: Prepared, registry: Registry) -> None:
    """Open what a run opens: the tokenizer, the weights' names, the data, the checkpoint it goes on from.

    Nothing is computed, and one sample is read. Raises UsageError or DataError.
    """
    try:
        _check(prepared, registry)
    except ZooError:
        # Checkpoints that another process writes come and go while they are looked at.
        require_free(prepared.out)
        raise


def _check(prepared: Prepared, registry: Registry) -> None:
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
