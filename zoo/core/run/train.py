"""The course of a run on one rank: join, build, step, save, stop when asked."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from zoo.core.errors import DataError, NumericsError, SavedOnSignal, ZooError, one_line
from zoo.core.job.job import Job
from zoo.core.launch.launcher import inside_launcher
from zoo.core.launch.process_group import any_rank, process_group
from zoo.core.launch.signals import NOTHING_YET, StopSignals, start_is_over
from zoo.core.launch.watchdog import Heartbeat
from zoo.core.plan.prepare import prepare
from zoo.core.plan.prepared import Prepared
from zoo.core.registry.decisions import Observers, Registry
from zoo.core.registry.loading import Plugins
from zoo.core.run.agreement import agreed
from zoo.core.run.determinism import determinism
from zoo.core.run.nan_trace import first_of_ranks, traced
from zoo.core.run.reporter import FirstRankReporter, Reporter
from zoo.core.run.run import Run
from zoo.core.run.run_lines import first_empty, nothing_trained, rows_read
from zoo.core.run.run_lock import alone_in
from zoo.core.run.saver import Saved
from zoo.core.run.trackers import Trackers


def train(job: Job, plugins: Plugins, heartbeat: Heartbeat) -> Path:
    """Train to the last step and return the run directory. Collective: every rank calls it with the same job.

    Raises SavedOnSignal after a save that a signal asked for, NumericsError at the first loss that is no number,
    and whatever is wrong with the job, its data or its checkpoint.
    """
    registry = Registry(plugins)
    with joined(heartbeat) as (signals, device):
        prepared = agreed(lambda: prepare(job, registry, world_size=dist.get_world_size()), plugins)
        return train_prepared(prepared, registry, signals, heartbeat, device)


@contextlib.contextmanager
def joined(heartbeat: Heartbeat) -> Iterator[tuple[StopSignals, torch.device]]:
    """Join the other ranks, and hear signals; gives this rank's device too."""
    heartbeat.enters("joining the other ranks")
    with StopSignals(alone=not inside_launcher()) as signals, process_group() as device:
        heartbeat.enters("reading the job")
        yield signals, device


def train_prepared(
    prepared: Prepared, registry: Registry, signals: StopSignals, heartbeat: Heartbeat, device: torch.device
) -> Path:
    """Do as `train`, once ranks have joined, with a job that is the same on all of them."""
    with determinism(prepared.job.model.deterministic), alone_in(prepared.out):
        heartbeat.enters("building the model")
        run = Run.build(prepared, registry, device)
        reporter = _reporter(run, registry) if dist.get_rank() == 0 else Reporter()
        try:
            try:
                _loop(run, signals, reporter, heartbeat)
            except NumericsError as error:
                _heard(run.saver.wait(), reporter)
                raise _blamed(error, run, registry, reporter, heartbeat) from None
        except BaseException as error:
            # Ranks that end by their own word, alone or together, have peers that still write what was begun.
            if isinstance(error, ZooError) or dist.get_world_size() == 1:
                with contextlib.suppress(Exception):  # of which this is not the cause
                    _heard(run.saver.wait(), reporter)
            reporter.ended(error)
            raise
        finally:
            run.close()
        reporter.ended(None)
        return run.path


def _loop(run: Run, signals: StopSignals, reporter: Reporter, heartbeat: Heartbeat) -> None:
    job = run.prepared.job
    _begin(run, signals, heartbeat)
    reporter.started()
    _say_what_is_read(run, reporter)
    for note in run.notes:
        reporter.noted(note)
    run.meter.restart_clock()
    while run.state.step < job.schedule.steps:
        heartbeat.beat()
        run.meter.add(run.step())
        step = run.state.step
        stopping = any_rank(signals.asked)
        last = step == job.schedule.steps
        due = last or stopping or step % job.checkpoint.every == 0
        if due or step % job.log.every == 0:
            _report(run, reporter)
        if last:
            reporter.noted(rows_read(run.position, empty_steps=run.meter.empty_steps))
        _heard(run.saver.ended(), reporter)
        if last and not run.meter.trained:
            raise nothing_trained(job)
        if due:
            _save(run, reporter, must=last or stopping)
        if stopping and not last:
            raise SavedOnSignal(f"saved step {step} of {job.schedule.steps} in {run.path}; the same command goes on")


def _begin(run: Run, signals: StopSignals, heartbeat: Heartbeat) -> None:
    """Wait until every rank has its first data, the end of the start. Raises SavedOnSignal on all if one was asked.

    All wait once before signals are left to `signals`: a rank that a signal ends then leaves none in its first step.
    """
    heartbeat.enters("reading the first data")
    run.feed.ready()
    any_rank(signals.asked)
    start_is_over()
    if any_rank(signals.asked) and run.state.step < run.prepared.job.schedule.steps:
        raise SavedOnSignal(NOTHING_YET)


def _report(run: Run, reporter: Reporter) -> None:
    """Say what is known of the steps since the last time, and of the first step that trained nothing."""
    before = run.meter.empty_steps
    steps = run.meter.flush()
    reporter.stepped(steps)
    if not before and run.meter.empty_steps:
        reporter.noted(first_empty(steps))


def _say_what_is_read(run: Run, reporter: Reporter) -> None:
    """Say before the first step what became of its samples: what is wrong with the data need not cost a step."""
    ahead = run.feed.ahead() if run.stream is not None else None
    if run.stream is None or ahead is None:
        return
    for note in run.stream.notes:
        reporter.noted(f"{'warning':<10}{note}")
    reporter.noted(rows_read(ahead, empty_steps=run.meter.empty_steps))


def _blamed(
    error: NumericsError, run: Run, registry: Registry, reporter: Reporter, heartbeat: Heartbeat
) -> NumericsError:
    """The error with the module it began in: from the last checkpoint on the steps are computed again; collective.

    Weights after a bad step are bad everywhere, and those before it are nowhere but there.
    """
    own = run.checkpoints.steps()
    kept = f"step-{own[-1]} is intact" if own else "there was no checkpoint yet"
    reporter.noted(f"{error}; computing from step {own[-1] if own else run.first_step} on again, to find the module")
    heartbeat.enters("computing again, to find the module")
    run.feed.drain()
    del run.state  # to make room
    gc.collect()
    resume = run.prepared.job.replace("checkpoint", resume="auto") if own else run.prepared.job
    again = Run.build(replace(run.prepared, job=resume), registry, run.device)
    try:
        while again.state.step < error.step - 1:
            heartbeat.beat()
            again.step()
        with traced(again.state.model) as trace:
            again.step()
        where = first_of_ranks(trace)
    finally:
        again.feed.drain()
        if again.stream is not None:
            again.stream.close()
    return NumericsError(f"{error}; {where}. {kept}", error.step)


def _save(run: Run, reporter: Reporter, *, must: bool) -> None:
    """Save now, once the save before has ended. Raises SaveFailed if it `must` be; else a failure is a warning."""
    _heard(run.saver.wait(), reporter)
    saved = run.save(beside=run.prepared.job.checkpoint.background and not must)
    if must and saved is not None and saved.failure is not None:
        raise saved.failure
    _heard([saved] if saved is not None else [], reporter)


def _heard(ended: Sequence[Saved], reporter: Reporter) -> None:
    """Say how saves ended."""
    for save in ended:
        if save.path is not None:
            reporter.saved(save.step, save.path)
        elif save.failure is not None:
            reporter.noted(f"warning: {save.failure.what}. The run goes on, and saves again when next due")


def _reporter(run: Run, registry: Registry) -> Reporter:
    """The reporter of rank 0; leaves config.yaml on the way. Raises DataError if the run's files cannot be written."""
    job = run.prepared.job
    with _writable(run.path):
        fresh = run.path / ".config.yaml.new"
        fresh.write_text(yaml.safe_dump(job.settings(), sort_keys=False))
        fresh.replace(run.path / "config.yaml")
    trackers = Trackers(registry, job.log.track, run.path)
    with _writable(run.path):
        return FirstRankReporter(run.info, observers=Observers(registry.plugins), trackers=trackers)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn what the disk says inside `with` into a DataError that names the run."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or one_line(error)}; see to the disk and type the same command "
            "again, or give another --out"
        ) from None
