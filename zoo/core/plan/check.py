"""What a job is refused for before anything is chosen: wrong words, contradictions, data that is not there."""

from __future__ import annotations

from typing import Any

from zoo.core.data.collate import MASKS
from zoo.core.data.rows import open_source
from zoo.core.errors import UsageError, did_you_mean
from zoo.core.job.job import Job
from zoo.core.machine.launcher_env import speaks
from zoo.core.plan.origin import ModelSource
from zoo.core.registry.decisions import Registry
from zoo.core.sequence.row_layout import BALANCES

_DTYPES = ("auto", "float32", "bfloat16", "float64")
_CHOICES = {
    "model.dtype": _DTYPES,
    "schedule.decay": ("cosine", "linear", "constant"),
    "data.overlong": (None, "error", "split", "truncate", "drop"),
    "data.loss_on": ("assistant", "completion", "last", "all"),
    "attention.mask": MASKS,
    "layout.degrees": (None, "auto"),
    "layout.cp_balance": BALANCES,
    "layout.cp_wire": (None, "bfloat16", "float16", "float32"),
}


def check_values(job: Job) -> None:
    """Raise UsageError for words that are no choice, and numbers that contradict each other."""
    values = {f"{section}.{key}": value for section, part in job.settings().items() for key, value in part.items()}
    for key, allowed in _CHOICES.items():
        value = values.get(key)
        if value not in allowed and value is not None:
            words = [word for word in allowed if word]
            hint = did_you_mean(str(value), words)
            raise UsageError(f"{key} is '{value}'; it is one of {', '.join(words)}{f' ({hint})' if hint else ''}")
    steps, warmup = job.schedule.steps, job.schedule.warmup
    if warmup is not None and warmup > steps:
        raise UsageError(
            f"schedule.warmup {warmup} is longer than the run of {steps} steps, so the learning rate would never reach "
            f"{job.optim.lr}; give --set schedule.warmup={steps} or less, or --steps {warmup} or more"
        )


def check_reachable(job: Job, registry: Registry) -> None:
    """Raise UsageError, PluginError or DataError for data or a tracker that cannot be had."""
    if not job.data.path:
        raise UsageError(f"what should {job.model.name} be trained on? Give --data FILE, DIRECTORY or GLOB")
    open_source(registry, job.data.path)
    # Only the first rank needs them.
    for tracker in job.log.track if speaks() else ():
        registry.trackers.load(tracker)


def check_windows(job: Job, origin: ModelSource, config: Any) -> None:
    """Raises UsageError where a sliding window has no meaning under the job's mask."""
    narrow = next((window for window in origin.spec.windows(config) if window is not None), None)
    if narrow is not None and job.attention.mask != "causal":
        raise UsageError(
            f"attention.mask is {job.attention.mask} and {origin.entry.name} has layers with a sliding window of "
            f"{narrow} tokens, which narrows a causal mask only; leave attention.mask causal"
        )
