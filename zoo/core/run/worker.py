"""The work of a training run on a rank of zoo's launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.core.job.job import Job
from zoo.core.launch.launcher import Work
from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.signals import NOTHING_YET
from zoo.core.launch.watchdog import RESUMES, Heartbeat
from zoo.core.registry.failures import plugins_named
from zoo.core.registry.loading import Plugins
from zoo.core.run.train import train
from zoo.core.storage.finished import resume_after_restart

TRAINING = Work(
    target="zoo.core.run.worker:train_as_asked",
    on_signal="finishing the step, then saving. Again aborts without saving",
    again=RESUMES,
    stopped=NOTHING_YET,
)


def train_as_asked(payload: dict[str, Any], _rank_folder: RankFolder, heartbeat: Heartbeat) -> None:
    """The work of a training run: the job and the plugins that the launcher resolved."""
    job = Job.from_plain(payload["job"])
    if payload["restart"] and job.checkpoint.out is not None:
        resume = resume_after_restart(Path(job.checkpoint.out), job.checkpoint.resume)
        job = job.replace("checkpoint", resume=resume)
    plugins = Plugins.from_resolved(payload["plugins"])
    with plugins_named(plugins):
        train(job, plugins, heartbeat)
