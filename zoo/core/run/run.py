"""What a run holds on one rank: built once, and moved by a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from zoo.core.contracts.parallel import Counts
from zoo.core.contracts.run import RunInfo
from zoo.core.data.rows import RowStream
from zoo.core.launch.collective import on_rank_zero, shared
from zoo.core.launch.process_group import host_group
from zoo.core.mesh.mesh import Mesh
from zoo.core.model.inventory import meta_model, rules_for
from zoo.core.model.load import ModuleSource, load_into
from zoo.core.plan.prepared import Prepared
from zoo.core.registry.decisions import Registry
from zoo.core.registry.failures import plugins_named
from zoo.core.run import assemble, checkpoint
from zoo.core.run.agreement import compare
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.feed import Feed, Position, reads_data
from zoo.core.run.metrics import Meter, Pending
from zoo.core.run.optim import build_optimizer, build_schedule
from zoo.core.run.resume import checked_progress, same_run
from zoo.core.run.saver import Saved, Saver
from zoo.core.run.step import TrainState, train_step
from zoo.core.run.verify import check_source_among_ranks
from zoo.core.storage import finished
from zoo.core.storage.checksums import Checksums


@dataclass(slots=True)
class Run:
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
    def build(cls, prepared: Prepared, registry: Registry, device: torch.device) -> Run:
        """Mesh, data, model, weights, optimizer, and what a checkpoint knows, in this order."""
        job, path = prepared.job, prepared.out
        mesh = Mesh(prepared.layout.degrees, device.type)
        stream = shared(
            lambda: prepared.open_rows(registry) if reads_data(mesh) else None, named=plugins_named(registry.plugins)
        )
        compare(stream.identity if stream else None, "Give every host the same files")
        state = _build_state(prepared, mesh, device)
        meter = Meter(
            seq=job.data.seq,
            global_batch=prepared.layout.global_batch,
            world_size=dist.get_world_size(),
            peak_tflops=job.log.peak_tflops,
            device=device,
        )
        checkpoints = Checkpoints(path, keep=job.checkpoint.keep)
        saved, notes = on_rank_zero(lambda: _start_from(checkpoints, job.checkpoint.resume))
        # Read now: the source may be gone, or another, when a save is due.
        shared(lambda: prepared.hub_files if dist.get_rank() == 0 else None)
        if saved is not None:
            _resume(saved, prepared, state, stream, meter)
        position = Position.of(stream)
        feed = Feed(
            stream,
            mesh=mesh,
            layout=prepared.layout,
            adapters=prepared.adapters,
            mask=job.attention.mask,
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
        counts = Counts(data.trained_tokens, self.prepared.layout.global_batch, data.document_tokens)
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


def _build_state(prepared: Prepared, mesh: Mesh, device: torch.device) -> TrainState:
    """This rank's model with values, and its optimizer."""
    job, spec, config = prepared.job, prepared.spec, prepared.config
    model = assemble.build(
        spec,
        config,
        mesh=mesh,
        layout=prepared.layout,
        backend=prepared.backend,
        adapters=prepared.adapters,
        policy=prepared.policy,
        device=device,
    )
    if prepared.source is not None:
        check_source_among_ranks(prepared.source)
        source = prepared.source.tensors
        rules = () if prepared.source.own_names else rules_for(spec, config, source)
        load_into(model, source, rules, whole_model=meta_model(spec, config))
    else:
        torch.manual_seed(job.data.seed)
        whole = spec.build(config)
        load_into(model, ModuleSource(whole), (), whole_model=whole)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        schedule=build_schedule(job.schedule),
        lr=job.optim.lr,
        clip=job.optim.clip,
        forward_backward=assemble.forward_backward(
            model, spec.plan(config), mesh=mesh, layout=prepared.layout, adapters=prepared.adapters
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
