"""A run on one rank: set up once, step, save, stop when asked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import yaml

from zoo.core import checkpoint, finished, order, weights
from zoo.core.agreement import agreed, compare, shared
from zoo.core.checkpoint import Checkpoints
from zoo.core.checksums import Checksums
from zoo.core.contracts import RunInfo
from zoo.core.determinism import determinism
from zoo.core.errors import NumericsError, SavedOnSignal, UsageError, ZooError
from zoo.core.feed import Feed, Position, reads_data
from zoo.core.forward_backward import Counts
from zoo.core.inventory import meta_model, rules_for
from zoo.core.job import Job
from zoo.core.launch import inside_launcher
from zoo.core.mesh import Mesh
from zoo.core.metrics import Meter, Pending
from zoo.core.numerics import first_of_ranks, traced
from zoo.core.optim import build_optimizer, build_schedule
from zoo.core.plugins import Plugins
from zoo.core.prepare import Prepared, prepare
from zoo.core.registry import Observers, Registry
from zoo.core.resume import checked_progress, same_run
from zoo.core.rows import RowStream
from zoo.core.run_lines import first_empty, nothing_trained, rows_read
from zoo.core.saver import Saved, Saver
from zoo.core.signals import NOTHING_YET, StopSignals, start_is_over
from zoo.core.step import TrainState, train_step
from zoo.core.verify import check_source_among_ranks, on_rank_zero
from zoo.core.voice import FirstRankVoice, Voice
from zoo.core.watchdog import Heart
from zoo.core.world import any_rank, host_group, process_group


def train(job: Job, plugins: Plugins, heart: Heart) -> Path:
    """Train to the last step and return the run directory. Collective: every rank calls it with the same job.

    Raises SavedOnSignal after a save that a signal asked for, NumericsError at the first loss that is no number,
    and whatever is wrong with the job, its data or its checkpoint.
    """
    registry = Registry(plugins)
    with joined(heart) as (signals, device):
        prepared = agreed(lambda: prepare(job, registry, world_size=dist.get_world_size()), plugins)
        return train_prepared(prepared, registry, signals, heart, device)


@contextlib.contextmanager
def joined(heart: Heart) -> Iterator[tuple[StopSignals, torch.device]]:
    """Join the other ranks, and hear signals; gives this rank's device too."""
    heart.enters("joining the other ranks")
    with StopSignals(alone=not inside_launcher()) as signals, process_group() as device:
        heart.enters("reading the job")
        yield signals, device


def train_prepared(
    prepared: Prepared, registry: Registry, signals: StopSignals, heart: Heart, device: torch.device
) -> Path:
    """Do as `train`, once ranks have joined, with a job that is the same on all of them."""
    with determinism(prepared.job.model.deterministic), _alone_in(prepared.out):
        heart.enters("building the model")
        run = _Run.build(prepared, registry, device)
        voice = _voice(run, registry) if dist.get_rank() == 0 else Voice()
        try:
            try:
                _loop(run, signals, voice, heart)
            except NumericsError as error:
                _heard(run.saver.wait(), voice)
                raise _blamed(error, run, registry, voice, heart) from None
        except BaseException as error:
            # Ranks that end by their own word, alone or together, have peers that still write what was begun.
            if isinstance(error, ZooError) or dist.get_world_size() == 1:
                with contextlib.suppress(Exception):  # of which this is not the cause
                    _heard(run.saver.wait(), voice)
            voice.ended(error)
            raise
        finally:
            run.close()
        voice.ended(None)
        return run.path


@dataclass(slots=True)
class _Run:
    """Everything a run holds on this rank."""

    prepared: Prepared
    state: TrainState
    feed: Feed
    stream: RowStream | None
    checkpoints: Checkpoints
    saver: Saver
    meter: Meter
    device: torch.device
    path: Path
    first_step: int
    position: Position
    notes: Sequence[str]
    """What is to be said of the checkpoints that were found."""

    @classmethod
    def build(cls, prepared: Prepared, registry: Registry, device: torch.device) -> _Run:
        """Mesh, data, model, weights, optimizer, and what a checkpoint knows, in this order."""
        job, path = prepared.job, prepared.out
        mesh = Mesh(prepared.degrees, device.type)
        stream = shared(lambda: prepared.open_rows(registry) if reads_data(mesh) else None)
        compare(stream.identity if stream else None, "Give every host the same files")
        state = _build_state(prepared, mesh, device)
        meter = Meter(
            seq=job.data.seq,
            global_batch=prepared.global_batch,
            world_size=dist.get_world_size(),
            peak_tflops=job.log.peak_tflops,
            device=device,
        )
        checkpoints = Checkpoints(path, keep=job.checkpoint.keep)
        saved, notes = on_rank_zero(lambda: _start_from(checkpoints, job.checkpoint.resume))
        if dist.get_rank() == 0:
            prepared.hub_files  # noqa: B018 - read now: the source may be gone, or another, when a save is due
        if saved is not None:
            _resume(saved, prepared, state, stream, meter)
        position = Position.of(stream)
        feed = Feed(
            stream,
            mesh=mesh,
            degrees=prepared.degrees,
            adapters=prepared.adapters,
            setup=prepared.setup,
            global_batch=prepared.global_batch,
            micro_batch=job.data.micro_batch,
            mask=job.attention.mask,
            windows=prepared.windows,
            steps=job.schedule.steps - state.step,
        )
        saver = Saver(checkpoints, host_group())
        return cls(prepared, state, feed, stream, checkpoints, saver, meter, device, path, state.step, position, notes)

    def step(self) -> Pending:
        """One optimizer step. Random numbers depend on seed and step only, so a resumed run draws the same."""
        start = time.perf_counter()
        data = self.feed.step(self.device)
        data_s, self.position = time.perf_counter() - start, data.position
        torch.manual_seed(self.prepared.job.data.seed * 1_000_003 + self.state.step)
        counts = Counts(data.trained_tokens, self.prepared.global_batch, data.document_tokens)
        result = train_step(self.state, data.batches, counts)
        flops = self.prepared.spec.flops_per_token(self.prepared.config, data.mean_visible_keys)
        return Pending(self.state.step, result, data.trained_tokens, flops, data_s)

    def save(self, *, beside: bool) -> Saved | None:
        """A checkpoint of the current step; None if it is written beside the steps that follow; collective."""
        progress = {
            "step": self.state.step,
            **self.meter.progress(),
            "cursor": self.position.cursor,
        } | same_run(self.prepared)
        save = self.saver.start if beside else self.saver.write
        saved = save(self.state, progress, lambda: self.prepared.hub_files)
        self.meter.restart_clock()
        return saved

    def close(self) -> None:
        self.feed.close()
        self.saver.close()
        if self.stream is not None:
            self.stream.close()

    @property
    def info(self) -> RunInfo:
        job = self.prepared.job
        return RunInfo(
            path=self.path,
            model=job.model.name,
            size=self.prepared.origin.size,
            steps=job.schedule.steps,
            first_step=self.first_step,
            world_size=dist.get_world_size(),
            config=job.settings(),
        )


def _loop(run: _Run, signals: StopSignals, voice: Voice, heart: Heart) -> None:
    job = run.prepared.job
    _begin(run, signals, heart)
    voice.started()
    _say_what_is_read(run, voice)
    for note in run.notes:
        voice.noted(note)
    run.meter.restart_clock()
    while run.state.step < job.schedule.steps:
        heart.beat()
        run.meter.add(run.step())
        step = run.state.step
        stopping = any_rank(signals.asked)
        last = step == job.schedule.steps
        due = last or stopping or step % job.checkpoint.every == 0
        if due or step % job.log.every == 0:
            _report(run, voice)
        if last:
            voice.noted(rows_read(run.position, empty_steps=run.meter.empty_steps))
        _heard(run.saver.ended(), voice)
        if last and not run.meter.trained:
            raise nothing_trained(job)
        if due:
            _save(run, voice, must=last or stopping)
        if stopping and not last:
            raise SavedOnSignal(f"saved step {step} of {job.schedule.steps} in {run.path}; the same command goes on")


def _begin(run: _Run, signals: StopSignals, heart: Heart) -> None:
    """Wait until every rank has its first data, the end of the start. Raises SavedOnSignal on all if one was asked.

    All wait once before signals are left to `signals`: a rank that a signal ends then leaves none in its first step.
    """
    heart.enters("reading the first data")
    run.feed.ready()
    any_rank(signals.asked)
    start_is_over()
    if any_rank(signals.asked) and run.state.step < run.prepared.job.schedule.steps:
        raise SavedOnSignal(NOTHING_YET)


def _report(run: _Run, voice: Voice) -> None:
    """Say what is known of the steps since the last time, and of the first step that trained nothing."""
    before = run.meter.empty_steps
    steps = run.meter.flush()
    voice.stepped(steps)
    if not before and run.meter.empty_steps:
        voice.noted(first_empty(steps))


def _say_what_is_read(run: _Run, voice: Voice) -> None:
    """Say before the first step what became of its samples: what is wrong with the data need not cost a step."""
    ahead = run.feed.ahead() if run.stream is not None else None
    if run.stream is None or ahead is None:
        return
    for note in run.stream.notes:
        voice.noted(f"{'warning':<10}{note}")
    voice.noted(rows_read(ahead, empty_steps=run.meter.empty_steps))


def _blamed(error: NumericsError, run: _Run, registry: Registry, voice: Voice, heart: Heart) -> NumericsError:
    """The error with the module it began in: from the last checkpoint on the steps are computed again; collective.

    Weights after a bad step are bad everywhere, and those before it are nowhere but there.
    """
    own = run.checkpoints.steps()
    kept = f"step-{own[-1]} is intact" if own else "there was no checkpoint yet"
    voice.noted(f"{error}; computing from step {own[-1] if own else run.first_step} on again, to find the module")
    heart.enters("computing again, to find the module")
    run.feed.drain()
    del run.state  # to make room
    gc.collect()
    resume = run.prepared.job.replace("checkpoint", resume="auto") if own else run.prepared.job
    again = _Run.build(replace(run.prepared, job=resume), registry, run.device)
    try:
        while again.state.step < error.step - 1:
            heart.beat()
            again.step()
        with traced(again.state.model) as trace:
            again.step()
        where = first_of_ranks(trace)
    finally:
        again.feed.drain()
        if again.stream is not None:
            again.stream.close()
    return NumericsError(f"{error}; {where}. {kept}", error.step)


def _save(run: _Run, voice: Voice, *, must: bool) -> None:
    """Save now, once the save before has ended. Raises SaveFailed if it `must` be; else a failure is a warning."""
    _heard(run.saver.wait(), voice)
    saved = run.save(beside=run.prepared.job.checkpoint.background and not must)
    if must and saved is not None and saved.failure is not None:
        raise saved.failure
    _heard([saved] if saved is not None else [], voice)


def _heard(ended: Sequence[Saved], voice: Voice) -> None:
    """Say how saves ended."""
    for save in ended:
        if save.path is not None:
            voice.saved(save.step, save.path)
        elif save.failure is not None:
            voice.noted(f"warning: {save.failure.what}. The run goes on, and saves again when next due")


def _build_state(prepared: Prepared, mesh: Mesh, device: torch.device) -> TrainState:
    """This rank's model with values, and its optimizer."""
    job, spec, config = prepared.job, prepared.spec, prepared.config
    model = order.build(
        spec,
        config,
        mesh=mesh,
        setup=prepared.setup,
        backend=prepared.backend,
        adapters=prepared.adapters,
        policy=prepared.policy,
        device=device,
    )
    if prepared.source is not None:
        check_source_among_ranks(prepared.source)
        source = prepared.source.tensors
        rules = () if prepared.source.own_names else rules_for(spec, config, source)
        weights.load_into(model, source, rules, whole_model=meta_model(spec, config))
    else:
        torch.manual_seed(job.data.seed)
        whole = spec.build(config)
        weights.load_into(model, weights.ModuleSource(whole), (), whole_model=whole)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        schedule=build_schedule(job.schedule),
        lr=job.optim.lr,
        clip=job.optim.clip,
        forward_backward=order.forward_backward(
            model, spec.plan(config), mesh=mesh, setup=prepared.setup, adapters=prepared.adapters
        ),
    )


def _start_from(checkpoints: Checkpoints, resume: str) -> tuple[Path | None, list[str]]:
    """Put the checkpoints of a run in order, on one rank. Return the one to go on from, and lines about all that."""
    notes = checkpoints.tidy()
    saved = finished.resume_point(checkpoints.run, resume)
    if saved is not None:
        notes += checkpoints.make_way(finished.read_progress(saved)["step"])
        if Checksums.read(saved) is None:
            notes.append(f"{saved} has no checksums, as an older zoo saved it; it was read unchecked")
    return saved, notes


def _resume(saved: Path, prepared: Prepared, state: TrainState, stream: RowStream | None, meter: Meter) -> None:
    progress = checked_progress(saved, prepared)
    checkpoint.load(state, saved)
    meter.resume(progress)
    if stream is not None:
        stream.load_state_dict(progress["cursor"])


def _alone_in(run: Path) -> IO[str]:
    """Lock the run directory against a second process that would write the same checkpoints.

    The lock ends with the file or with the process. Raises UsageError on every rank if somebody holds it.
    """
    file = shared(lambda: _lock_file(run))
    taken = [False]
    if dist.get_rank() == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = [True]
    dist.broadcast_object_list(taken, src=0)
    if taken[0]:
        raise UsageError(f"{run} is being trained by another process; wait for it, or give another --out")
    return file


def _lock_file(run: Path) -> IO[str]:
    """Make the run directory and open its lock. Raises UsageError where nothing can be written."""
    checkpoints = run / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (run, checkpoints):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        lock = run / ".lock"
        # In a copy it may be read-only or somebody else's; it is locked all the same.
        return lock.open("r" if lock.exists() and not os.access(lock, os.W_OK) else "a")
    except OSError as error:
        raise UsageError(
            f"the run cannot be written: {error.filename}: {error.strerror}; make it yours and writable "
            f"(chmod -R u+w {run}), or give another --out"
        ) from None


def _voice(run: _Run, registry: Registry) -> Voice:
    """The voice of rank 0; leaves config.yaml on the way."""
    job = run.prepared.job
    fresh = run.path / ".config.yaml.new"
    fresh.write_text(yaml.safe_dump(job.settings(), sort_keys=False))
    fresh.replace(run.path / "config.yaml")
    trackers = [registry.trackers.load(name)(run.path) for name in job.log.track]
    return FirstRankVoice(run.info, observers=Observers(registry.plugins), trackers=trackers)
