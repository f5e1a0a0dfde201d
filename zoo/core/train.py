"""A run on one rank: set up once, step, save, stop when asked."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch._C._distributed_c10d import HashStore

from zoo.core import checkpoint, order, weights
from zoo.core.checkpoint import Checkpoints
from zoo.core.contracts import RunInfo, Tracker
from zoo.core.device import accelerator_type
from zoo.core.errors import DataError, PluginError, SavedOnSignal, UsageError
from zoo.core.feed import Feed, reads_data
from zoo.core.job import Job
from zoo.core.launch import inside_launcher
from zoo.core.mesh import Mesh
from zoo.core.metrics import Meter, MetricsFile, Pending
from zoo.core.optim import build_optimizer, build_schedule
from zoo.core.plugins import Plugins, differences
from zoo.core.prepare import Prepared, prepare
from zoo.core.registry import Observers, Registry
from zoo.core.rows import RowStream, open_rows
from zoo.core.step import TrainState, train_step
from zoo.core.tokenizer import Tokenizer


def train(job: Job, plugins: Plugins) -> Path:
    """Train to the last step and return the run directory. Collective: every rank calls it with the same job.

    Raises SavedOnSignal after a save that a signal asked for, NumericsError at the first loss that is no number,
    and whatever is wrong with the job, its data or its checkpoint.
    """
    with _process_group() as device, _Signals() as signals:
        _same_plugins(plugins)
        registry = Registry(plugins)
        prepared = prepare(job, registry, world_size=dist.get_world_size())
        run = _Run.build(prepared, registry, device)
        if dist.get_rank() == 0:
            observers = Observers(plugins)
            trackers: list[Tracker] = [registry.trackers.load(name)(run.path) for name in prepared.job.log.track]
            _write_config(run.path, prepared.job)
        else:
            observers, trackers = None, []
        voice = _Voice(run, observers, trackers)
        try:
            _loop(run, signals, voice)
        except BaseException as error:
            voice.ended(error)
            raise
        finally:
            if run.stream is not None:
                run.stream.close()
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
    meter: Meter
    device: torch.device
    path: Path
    first_step: int

    @classmethod
    def build(cls, prepared: Prepared, registry: Registry, device: torch.device) -> _Run:
        """Mesh, model, weights, optimizer, data, and what a checkpoint knows, in this order."""
        job, path = prepared.job, prepared.out
        mesh = Mesh(prepared.degrees, device.type)
        state = _build_state(prepared, mesh, device)
        stream = _open_stream(prepared, registry) if reads_data(mesh) else None
        meter = Meter(
            seq=job.data.seq,
            global_batch=prepared.global_batch,
            world_size=dist.get_world_size(),
            peak_tflops=job.log.peak_tflops,
            device=device,
        )
        saved = checkpoint.resume_point(path, job.checkpoint.resume)
        if saved is not None:
            _resume(saved, prepared, state, stream, meter)
        feed = Feed(
            stream,
            mesh=mesh,
            degrees=prepared.degrees,
            adapters=prepared.adapters,
            setup=prepared.setup,
            global_batch=prepared.global_batch,
            micro_batch=job.data.micro_batch,
        )
        checkpoints = Checkpoints(path, keep=job.checkpoint.keep)
        return cls(prepared, state, feed, stream, checkpoints, meter, device, path, state.step)

    def step(self) -> Pending:
        """One optimizer step. Random numbers depend on seed and step only, so a resumed run draws the same."""
        start = time.perf_counter()
        data = self.feed.step(self.device)
        data_s = time.perf_counter() - start
        torch.manual_seed(self.prepared.job.data.seed * 1_000_003 + self.state.step)
        result = train_step(self.state, data.batches, data.trained_tokens)
        flops = self.prepared.spec.flops_per_token(self.prepared.config, data.mean_visible_keys)
        return Pending(self.state.step, result, data.trained_tokens, flops, data_s)

    def save(self) -> Path:
        """A finished checkpoint of the current step; collective."""
        progress = {
            "step": self.state.step,
            "tokens": self.meter.tokens,
            "trained_tokens": self.meter.trained,
            "seq": self.prepared.job.data.seq,
            "global_batch": self.prepared.global_batch,
            "model": self.prepared.hub_config,
            "cursor": self.stream.state_dict() if self.stream is not None else None,
        }
        return self.checkpoints.save(self.state, progress, self.prepared.hub_files())

    def rows_read(self) -> str:
        """What became of the samples so far. Nothing is left out in silence."""
        if self.stream is None:
            return ""
        stats, fill = self.stream.stats, 100 * self.stream.fill
        trained = 100 * stats.trained_tokens / max(1, stats.tokens)
        return (
            f"{'rows':<10}{stats.samples:,} samples read into {stats.rows:,} rows, {fill:.1f}% full, {trained:.0f}% "
            f"trained; {stats.split:,} split, {stats.truncated:,} truncated, {stats.dropped:,} dropped, "
            f"{stats.blank:,} blank"
        )

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


def _loop(run: _Run, signals: _Signals, voice: _Voice) -> None:
    job = run.prepared.job
    voice.started()
    while run.state.step < job.schedule.steps:
        run.meter.add(run.step())
        step = run.state.step
        stopping = signals.any_rank_asked()
        last = step == job.schedule.steps
        due = last or stopping or step % job.checkpoint.every == 0
        if due or step % job.log.every == 0:
            voice.said(run.meter.flush())
        if step == run.first_step + 1 or last:
            voice.noted(run.rows_read())
        if due:
            _save(run, voice, must=last or stopping)
        if stopping and not last:
            raise SavedOnSignal(f"saved step {step} of {job.schedule.steps} in {run.path}; the same command goes on")


def _save(run: _Run, voice: _Voice, *, must: bool) -> None:
    """Save now. In the middle of a run a failed save is a warning: the run goes on and tries again when next due."""
    try:
        voice.saved(run.state.step, run.save())
    except DataError as error:
        if must:
            raise
        voice.warned(f"{error}. The run goes on")


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
        weights.load_into(model, prepared.source.tensors, spec.rules(config))
    else:
        torch.manual_seed(job.data.seed)
        weights.load_into(model, weights.ModuleSource(spec.build(config)), ())
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        schedule=build_schedule(job.schedule),
        lr=job.optim.lr,
        clip=job.optim.clip,
    )


def _open_stream(prepared: Prepared, registry: Registry) -> RowStream:
    job = prepared.job
    path = prepared.origin.tokenizer_path
    tokenizer = Tokenizer.from_directory(path)
    if tokenizer.vocab_size > prepared.config.vocab_size:
        raise UsageError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens and the model only "
            f"{prepared.config.vocab_size}; --from must name a directory whose tokenizer belongs to its weights"
        )
    return open_rows(
        registry,
        data=str(job.data.path),
        data_format=job.data.format,
        tokenizer=tokenizer,
        seq=job.data.seq,
        seed=job.data.seed,
        overlong=job.data.overlong,
        loss_on=job.data.loss_on,
        chat_template=job.data.chat_template,
    )


def _resume(saved: Path, prepared: Prepared, state: TrainState, stream: RowStream | None, meter: Meter) -> None:
    progress = checkpoint.read_progress(saved)
    for key, now in (("seq", prepared.job.data.seq), ("global_batch", prepared.global_batch)):
        if progress[key] != now:
            raise UsageError(
                f"{saved} was trained with {key} {progress[key]} and this job has {now}: the data position would not "
                f"hold. Give --{key.replace('_', '-')} {progress[key]}, or start a new run with --out elsewhere"
            )
    checkpoint.load(state, saved)
    meter.tokens, meter.trained = progress["tokens"], progress["trained_tokens"]
    if stream is not None:
        stream.load_state_dict(progress["cursor"])


class _Voice:
    """What rank 0 tells the world; silent on all others."""

    def __init__(self, run: _Run, observers: Observers | None, trackers: list[Tracker]) -> None:
        self.info = run.info
        self.observers = observers
        self.trackers = trackers
        path = run.path / "metrics.jsonl"
        self.file = MetricsFile(path, first_step=run.first_step + 1) if observers is not None else None

    def started(self) -> None:
        if self.observers is not None:
            self.observers.run_start(run=self.info)

    def said(self, steps: list[dict[str, float]]) -> None:
        if self.observers is None or self.file is None:
            return
        for metrics in steps:
            self.file.write(metrics)
            for tracker in self.trackers:
                tracker.log(int(metrics["step"]), metrics)
        if steps:
            self.observers.step_end(run=self.info, step=int(steps[-1]["step"]), metrics=steps[-1])

    def saved(self, step: int, path: Path) -> None:
        if self.observers is not None:
            self.observers.checkpoint_saved(run=self.info, step=step, path=str(path))

    def noted(self, text: str) -> None:
        if self.observers is not None:
            sys.stderr.write(f"{text}\n")

    def warned(self, text: str) -> None:
        if self.observers is not None:
            sys.stderr.write(f"warning: {text}\n")

    def ended(self, error: BaseException | None) -> None:
        if self.observers is None or self.file is None:
            return
        for tracker in self.trackers:
            tracker.close()
        if error is None or isinstance(error, SavedOnSignal):
            self.observers.run_end(run=self.info, status="done" if error is None else "saved")
        else:
            self.observers.run_error(run=self.info, error=error)


class _Signals:
    """SIGTERM and SIGINT as a wish to save and stop, shared by all ranks. The launcher's death is one too."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _Signals:
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        self._parent = os.getppid()
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def any_rank_asked(self) -> bool:
        orphaned = inside_launcher() and os.getppid() != self._parent
        flag = torch.tensor([int(self._asked or orphaned)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _note(self, number: int, _frame: Any) -> None:
        if self._asked and not inside_launcher():
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def _process_group() -> Iterator[torch.device]:
    """The world: gloo for the host, and the accelerator's own backend beside it."""
    kind = accelerator_type()
    backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}" if kind else "gloo"
    if inside_launcher():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    device = torch.device("cpu")
    if kind:
        device = torch.device(kind, dist.get_node_local_rank(fallback_rank=0))
        torch.accelerator.set_device_index(device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _same_plugins(plugins: Plugins) -> None:
    """Compare what every rank loaded, before anything depends on it. Raises PluginError."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (plugins.fingerprint(), socket.gethostname(), plugins.resolved()))
    for rank, (fingerprint, host, resolved) in enumerate(everyone):
        if fingerprint != everyone[0][0]:
            what = "; ".join(differences(everyone[0][2], resolved))
            raise PluginError(
                f"rank {rank} (host {host}) loaded other plugins than rank 0: {what}. "
                f"Install the same environment on every host; compare `zoo plugins`"
            )


def _write_config(path: Path, job: Job) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(job.settings(), sort_keys=False))
