"""From a job to everything decided before a process starts: origin, length, layout, kernel, schemes, memory.

Each of these six stages is one call, which returns what was chosen and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zoo.core.contracts.attention import AttentionBackend
from zoo.core.contracts.entries import ModelEntry
from zoo.core.contracts.parallel import MemoryPolicy
from zoo.core.humanize import format_tokens
from zoo.core.job.job import Job, Settings
from zoo.core.machine.device import accelerator_type
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import Degrees
from zoo.core.model.inventory import model_facts
from zoo.core.plan.auto import choose_layout
from zoo.core.plan.check import check_reachable, check_values, check_windows
from zoo.core.plan.choices import choose_attention, choose_policy
from zoo.core.plan.length import choose_length
from zoo.core.plan.origin import ModelSource, choose_origin, named_by_source
from zoo.core.plan.prepared import Prepared
from zoo.core.plan.resolve import Resolver
from zoo.core.plan.schemes import choose_schemes, settled
from zoo.core.registry.decisions import Registry

_MASK_NOTES = {
    "prefix": "prompts (what comes before the first trained token) are seen whole, the rest is causal",
    "full": "every token sees its whole document, the label it is trained on included",
}


def prepare(job: Job, registry: Registry, *, world_size: int | None = None, machine: Machine | None = None) -> Prepared:
    """Decide everything that is open in a job and check the whole. Host only; the same answer on every rank.

    `world_size` is given inside a launcher, `machine` where it is not this one. Raises UsageError, FitError,
    PluginError or DataError.
    """
    check_values(job)
    origin, why_origin = choose_origin(job, registry)
    check_reachable(job, registry)
    length, why_length = choose_length(job, origin, registry)
    check_windows(job, origin, length.config)
    dtype = job.model.dtype if job.model.dtype != "auto" else "bfloat16" if accelerator_type() else "float32"
    resolver = Resolver(
        registry=registry,
        machine=machine or Machine.here(world_size=world_size, nproc=job.launch.nproc),
        model=model_facts(origin.entry.name, origin.spec, length.config),
        dtype=dtype,
        deterministic=job.model.deterministic,
    )
    resolution, why_layout = choose_layout(job.replace("data", seq=length.seq), resolver)
    job, layout = resolution.job, resolution.layout
    backend, why_backend = choose_attention(job, registry, layout.problems)
    schemes, why_schemes = choose_schemes(registry, layout, job.attention.mask)
    policy, why_policy = choose_policy(job, registry, length.config, layout.degrees, dtype)
    job = settled(_settled(job, dtype, layout.degrees, backend, policy), schemes)
    job = job.replace("checkpoint", out=job.checkpoint.out or _default_out(job, origin))
    notes = (
        ("run", f"{job.checkpoint.out} (the same command resumes it)"),
        ("model", "; ".join(filter(None, (f"{origin.entry.name} {origin.size}, {why_origin}", why_length)))),
        ("data", f"{job.data.path}, rows of {format_tokens(job.data.seq)} tokens, {layout.global_batch} a step"),
        ("layout", why_layout),
        *resolution.notes,
        ("attention", why_backend),
        *((("context", why_schemes),) if why_schemes else ()),
        *((("mask", _MASK_NOTES[job.attention.mask]),) if job.attention.mask in _MASK_NOTES else ()),
        ("memory", why_policy),
        *(("broken", sentence) for sentence in _joined(registry.passed_over())),
        *(("unusual", sentence) for sentence in _joined(job.unusual())),
    )
    return Prepared(
        job=job,
        origin=origin,
        config=length.config,
        hub_config=length.hub_config,
        layout=replace(layout, schemes=schemes),
        backend=backend,
        adapters=resolution.adapters,
        policy=policy,
        notes=notes,
    )


def elsewhere(job: Job, registry: Registry, machine: Machine) -> tuple[Job, Resolver]:
    """What a layout of accelerators that are not here is checked against: sizes are known without weights and data.

    The job comes back with its row length. Raises UsageError, PluginError or DataError.
    """
    entry: ModelEntry = registry.models.get(job.model.name)
    if job.model.source is None and job.model.size is None:
        job = job.replace("model", size=entry.default_size)
    origin = choose_origin(job, registry, needs_weights=False).value
    length = choose_length(job, origin, registry).value
    dtype = "bfloat16" if job.model.dtype == "auto" else job.model.dtype
    facts = model_facts(entry.name, origin.spec, length.config)
    return job.replace("data", seq=length.seq), Resolver(registry=registry, machine=machine, model=facts, dtype=dtype)


def with_recipe(registry: Registry, *layers: Settings) -> Job:
    """The job of layers (file, `--set`, flags) over what the family suggests for the size that is meant.

    Where no layer names the family, the checkpoint to start from does. Raises UsageError if there is none.
    """
    job = Job.from_settings(*layers)
    if not job.model.name:
        job = Job.from_settings({"model.name": (named_by_source(job, registry), "config.json")}, *layers)
    entry: ModelEntry = registry.models.get(job.model.name)
    size = ModelSource.size_of(job, entry)
    said = f"recipe of {entry.name} {size}"
    recipe: Settings = {key: (value, said) for key, value in entry.recipes.get(size, {}).items()}
    return Job.from_settings({"model.name": (entry.name, said), **recipe}, *layers)


def _joined(sentences: Sequence[str]) -> list[str]:
    """Return one sentence of all, if there are any."""
    return ["; ".join(sentences)] if sentences else []


def _settled(
    job: Job,
    dtype: str,
    degrees: Degrees,
    backend: AttentionBackend,
    policy: MemoryPolicy,
) -> Job:
    """The job with every choice written in, so that config.yaml runs the same again."""
    job = job.replace("model", dtype=dtype).replace("attention", backend=backend.name).replace("launch", nproc=None)
    return job.replace("memory", policy=policy.name).replace("layout", degrees=None, **degrees.mapping())


def _default_out(job: Job, origin: ModelSource) -> str:
    """runs/<model>-<size>-<seq>-<hash>: the same command finds its run again, another command another."""
    # How ranks are kept alive and when a save is written make it no other run.
    lasting = job.replace("layout", timeout=None).settings()
    del lasting["launch"], lasting["checkpoint"]["async"]
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()[:6]
    base = Path("runs") / f"{origin.entry.name}-{origin.size}-{format_tokens(job.data.seq)}-{digest}"
    if job.checkpoint.resume != "never":
        return str(base)
    others = (base.with_name(f"{base.name}-{number}") for number in range(2, 1_000_000))
    return str(next(path for path in others if not path.exists())) if base.exists() else str(base)
