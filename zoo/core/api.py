"""What the commands and `import zoo` both call: load a model, plan a job, run it."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.core.errors import UsageError, one_line
from zoo.core.job.flags import from_flags
from zoo.core.job.job import Job
from zoo.core.launch.lasting_output import open_closed_streams
from zoo.core.launch.launcher import WorkerDied, launch
from zoo.core.launch.process_group import lost_touch
from zoo.core.launch.watchdog import Heartbeat, Limits, LoneHeartbeat
from zoo.core.machine.device import accelerator_type, peak_tflops
from zoo.core.machine.launcher_env import OuterRank
from zoo.core.machine.resources import Machine
from zoo.core.mesh.drawing import draw_svg, draw_text, wrapped
from zoo.core.model.answers import built, loaded_spec, parsed
from zoo.core.model.inventory import checked_book
from zoo.core.model.load import allocate, load_into
from zoo.core.plan.auto import with_degrees
from zoo.core.plan.job_plan import JobPlan, job_plan
from zoo.core.plan.nodes import fill_nodes
from zoo.core.plan.origin import family_of, open_checkpoint
from zoo.core.plan.prepare import elsewhere, prepare, with_recipe
from zoo.core.plan.prepared import Prepared
from zoo.core.plan.resolve_degrees import resolve_degrees
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.run.agreement import agreed
from zoo.core.run.preflight import check_start
from zoo.core.run.train import joined, train, train_prepared
from zoo.core.run.worker import TRAINING
from zoo.core.storage import finished

if TYPE_CHECKING:
    from torch import nn

_BUSY = threading.Lock()


def load(path: str | Path, dtype: str | None = None, device: str | None = None) -> nn.Module:
    """A module with `model(tokens [B, T]) -> logits [B, T, V]` from a run, an imported or a Hugging Face directory.

    `dtype` is the stored one if not given. Raises DataError or UsageError.
    """
    registry = Registry(Plugins.load())
    opened = open_checkpoint(str(path), registry)
    finished.require_intact(opened.checksums, of_run=opened.own_names)
    if opened.own_names and opened.checksums is None:
        warnings.warn(f"{path} has no checksums, so it is read unchecked", stacklevel=2)
    spec = loaded_spec(registry.models, family_of(opened, str(path), registry))
    config = parsed(spec, opened.config)
    book = checked_book(opened, spec, config)
    stored = opened.tensors.dtype(next(iter(opened.tensors.names())))
    with torch.device("meta"):
        model: nn.Module = built(spec, config).to(getattr(torch, dtype or stored))
    allocate(model, torch.device(device or "cpu"))
    spec.init_buffers(model, config)
    rules = () if opened.own_names else book.rules
    load_into(model, opened.tensors, rules)
    return model.eval()


def plan(model: str | None = None, *, traffic: bool = False, **flags: Any) -> JobPlan:
    """Everything that would be decided for a job, checked, before any process starts. Keywords are the command's flags.

    With `traffic` it also says what a rank sends in a step. Raises UsageError, PluginError or DataError.
    """
    return job_plan(ready(Plugins.load(), model, flags), traffic=traffic)


def finetune(model: str | None = None, **flags: Any) -> Path:
    """Run a job to its end and return the run directory. Keywords are the command's flags (`seq="64k", cp=8`).

    Raises what `plan` raises, SavedOnSignal, NumericsError, and WorkerDied if a rank was lost.
    """
    open_closed_streams()
    return run(Plugins.load(), model, flags)


def ready(plugins: Plugins, model: str | None, flags: Mapping[str, Any], world_size: int | None = None) -> Prepared:
    """Decide and check a job with given plugins, and with the number of ranks an outer launcher started, if any."""
    registry = Registry(plugins)
    prepared = prepare(with_recipe(registry, *from_flags(model, flags)), registry, world_size=world_size)
    check_start(prepared, registry)
    return prepared


def run(
    plugins: Plugins, model: str | None, flags: Mapping[str, Any], say: Callable[[str], None] = lambda _line: None
) -> Path:
    """Do as `finetune` with given plugins; `say` gets the lines that head the run."""
    with _one_at_a_time():
        outer = OuterRank.from_environment()
        return _started(plugins, model, flags, say) if outer is None else _joined(outer, plugins, model, flags, say)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Refuse a second run beside the first: they would share one process group, one device and one set of signals."""
    if not _BUSY.acquire(blocking=False):
        raise UsageError(
            "zoo.finetune is training in this process already; wait until it returns, or start a process for each run"
        )
    try:
        yield
    finally:
        _BUSY.release()


def _started(plugins: Plugins, model: str | None, flags: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """Train in this process, or in ranks that are started here."""
    prepared = ready(plugins, model, flags)
    job, out, ranks = prepared.job, prepared.out, prepared.layout.degrees.world_size
    for line in job_plan(prepared).lines():
        say(line)
    if _is_done(prepared, say):
        return out
    if job.log.peak_tflops is None:
        job = job.replace("log", peak_tflops=peak_tflops(prepared.layout.dtype, ranks))
    if ranks == 1 and not job.launch.max_restarts:  # else there must be somebody who starts it again
        return train(job, plugins, Heartbeat())
    launch(
        {"job": job.settings(), "plugins": plugins.resolved()},
        ranks,
        TRAINING,
        max_restarts=job.launch.max_restarts,
        timeout_s=job.layout.timeout,
    )
    return out


def _joined(
    outer: OuterRank, plugins: Plugins, model: str | None, flags: Mapping[str, Any], say: Callable[[str], None]
) -> Path:
    """Train as one of the ranks of an outer launcher. Raise WorkerDied if the others cannot be reached any more.

    Ranks meet before anything is decided, so that what one of them must refuse is refused by all.
    """
    registry = Registry(plugins)
    try:
        with LoneHeartbeat(outer.rank, Limits.of(None)) as heartbeat, joined(heartbeat) as (signals, device):
            prepared = agreed(lambda: ready(plugins, model, flags, outer.world_size), plugins)
            heartbeat.expects(Limits.of(prepared.job.layout.timeout))
            for line in job_plan(prepared).lines() if outer.rank == 0 else ():
                say(line)
            if _is_done(prepared, say if outer.rank == 0 else lambda _line: None):
                return prepared.out
            # On a CPU the peak is measured, which the ranks would do all at once.
            if prepared.job.log.peak_tflops is None and accelerator_type():
                peak = peak_tflops(prepared.layout.dtype, outer.world_size)
                prepared = replace(prepared, job=prepared.job.replace("log", peak_tflops=peak))
            return train_prepared(prepared, registry, signals, heartbeat, device)
    except RuntimeError as error:
        if not lost_touch(error):
            raise
        raise WorkerDied(f"rank {outer.rank} lost touch with other ranks: {one_line(error)}", TRAINING) from None


def _is_done(prepared: Prepared, say: Callable[[str], None]) -> bool:
    """Return whether there is no step left to train, and say so."""
    steps = prepared.job.schedule.steps
    done = finished.is_done(finished.resume_point(prepared.out, prepared.job.checkpoint.resume), prepared.out, steps)
    if done:
        say(f"{'done':<10}all {steps} steps already; --steps or --out for more")
    return done


def layout(
    plugins: Plugins,
    model: str | None,
    flags: Mapping[str, Any],
    *,
    nodes: int | None,
    gpus_per_node: int,
    gpu_memory: float,
) -> tuple[str, str]:
    """The mesh of a job as text and as SVG; by arithmetic alone, so also for axes that no adapter serves yet.

    `nodes` of `gpus_per_node` ranks are filled if given; else there are as many ranks as the degrees need. With
    `--layout auto` degrees are chosen for a model on such nodes, one if not said, with `gpu_memory` GB a rank.
    """
    # The name of a model has no part in it, unless degrees are to be chosen for it.
    job = Job.from_settings(*from_flags(model or "any", flags))
    if job.layout.degrees == "auto":
        return _chosen_layout(plugins, model, flags, (nodes or 1, gpus_per_node), gpu_memory)
    if nodes is None:
        degrees = resolve_degrees(job.layout, world_size=None, available=None)
    else:
        degrees = fill_nodes(job.layout, nodes, gpus_per_node)
    return draw_text(degrees, gpus_per_node, columns()), draw_svg(degrees, gpus_per_node)


def _chosen_layout(
    plugins: Plugins, model: str | None, flags: Mapping[str, Any], nodes: tuple[int, int], gpu_memory: float
) -> tuple[str, str]:
    """As `layout`, for degrees that are chosen, and why they are."""
    registry = Registry(plugins)
    machine = Machine(
        ranks=nodes[0] * nodes[1], said="these nodes are", per_node=nodes[1], memory=int(gpu_memory * 1e9)
    )
    job, resolver = elsewhere(with_recipe(registry, *from_flags(model, flags)), registry, machine)
    job, notes = with_degrees(job, resolver)
    degrees = resolver.resolve(job).layout.degrees
    why = "\n".join(line for topic, sentence in notes for line in wrapped(topic, sentence, columns()))
    return f"{why}\n\n{draw_text(degrees, nodes[1], columns())}", draw_svg(degrees, nodes[1])


def columns() -> int:
    """Characters of a line of the terminal; of a file, enough for most."""
    return shutil.get_terminal_size(fallback=(120, 24)).columns
