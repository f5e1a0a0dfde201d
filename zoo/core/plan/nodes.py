"""A job for nodes that are not this machine: checked here as far as this machine can know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.core.contracts.entries import ModelEntry
from zoo.core.errors import DataError, UsageError
from zoo.core.job.flags import from_flags
from zoo.core.job.job import Job, LayoutSection
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import AXES, Degrees, flag
from zoo.core.plan.nearest import nearest_numbers
from zoo.core.plan.origin import SCRATCH, choose_origin
from zoo.core.plan.prepare import prepare, with_recipe
from zoo.core.plan.resolve_degrees import resolve_degrees
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins


def check_for_nodes(
    plugins: Plugins, model: str | None, flags: Mapping[str, Any], *, nodes: int, gpus_per_node: int
) -> tuple[Job, str | None]:
    """The job, and what could not be checked, if anything: data and weights may live where the nodes are only.

    Raises what `zoo plan` raises, and UsageError with the nearest numbers if the ranks do not fit the degrees.
    """
    registry = Registry(plugins)
    layers = from_flags(model, flags)
    asked = Job.from_settings(*layers).model
    if not asked.name and asked.source not in (None, SCRATCH) and not Path(asked.source).exists():
        raise UsageError(
            f"which model? --from {asked.source} is not on this machine; name its family too, as: finetune llama3 "
            f"--from {asked.source}"
        )
    job = with_recipe(registry, *layers)
    entry: ModelEntry = registry.models.get(job.model.name)
    if job.model.source is None and job.model.size is None:
        # The size that nodes with accelerators would take; this machine may have none.
        job = with_recipe(registry, *layers, {"model.size": (entry.default_size, "default")})
    ranks = fill_nodes(job.layout, nodes, gpus_per_node).world_size
    if job.model.source not in (None, SCRATCH) and not Path(job.model.source).exists():
        return job, _unchecked(f"--from {job.model.source}")
    if job.model.source is None and job.model.size in entry.sizes and not entry.embedded:
        return job, _unchecked(f"the checkpoint of {entry.name} {job.model.size}")
    # A checkpoint of a published size is as its config says, which is here; a kernel is the nodes' business.
    known = job if job.model.source else job.replace("model", source=SCRATCH)
    choose_origin(known, registry)
    if job.data.path and not _is_here(job.data.path, registry):
        return job, _unchecked(f"--data {job.data.path}")
    there = Machine(ranks=ranks, per_node=gpus_per_node)
    prepare(known.replace("attention", backend="auto"), registry, machine=there)
    return job, None


def fill_nodes(layout: LayoutSection, nodes: int, gpus_per_node: int) -> Degrees:
    """The degrees on all ranks of the nodes. Raises UsageError with the nearest numbers if they cannot fill them."""
    refusal = _misfit(layout, nodes, gpus_per_node)
    if refusal:
        raise UsageError(refusal)
    return resolve_degrees(layout, world_size=nodes * gpus_per_node, available=None)


def _unchecked(absent: str) -> str:
    return f"{absent} is not on this machine: names, settings and degrees were checked, not what depends on it"


def _is_here(data: str, registry: Registry) -> bool:
    try:
        return registry.open_data(data) is not None
    except DataError:
        return Path(data).exists()


def _misfit(layout: LayoutSection, nodes: int, gpus: int) -> str | None:
    """Why the degrees cannot fill the ranks, and what is nearest; None if they can."""
    degrees = {axis: getattr(layout, axis) or 1 for axis in AXES}
    if min(degrees.values()) < 1:
        return None  # resolve_degrees refuses it in better words
    fixed, ranks = math.prod(degrees.values()), nodes * gpus
    exact = layout.dp_shard is not None

    def fills(number: int, degree: int) -> bool:
        return number == degree if exact else number % degree == 0

    if fills(ranks, fixed):
        return None
    axis, degree = max(degrees.items(), key=lambda item: item[1])
    rest = fixed // degree
    choices = [f"--nodes {n}" for n in nearest_numbers(nodes, nodes + fixed, lambda n: fills(n * gpus, fixed))]
    choices += [f"{flag(axis)} {d}" for d in nearest_numbers(degree, ranks, lambda d: fills(ranks, rest * d))]
    asked = " x ".join(f"{flag(axis)} {degree}" for axis, degree in degrees.items() if degree > 1) or "one process"
    return (
        f"{asked} needs {'' if exact else 'a multiple of '}{fixed} ranks, "
        f"and --nodes {nodes} x --gpus-per-node {gpus} are {ranks}; "
        f"nearest: {' or '.join(choices) or f'--nodes 1 --gpus-per-node {fixed}'}"
    )
