"""From a job to everything that must be known before a process starts: model, layout, choices, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.core.contracts.attention import AttentionBackend
from zoo.core.contracts.checkpoints import HubCheckpoint
from zoo.core.contracts.entries import ModelEntry
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import ModelSpec
from zoo.core.contracts.parallel import MemoryPolicy, ParallelAdapter
from zoo.core.data.collate import MASKS
from zoo.core.data.rows import RowStream, open_rows, open_source
from zoo.core.errors import DataError, UsageError, did_you_mean
from zoo.core.humanize import format_tokens
from zoo.core.job.job import Job, Settings
from zoo.core.machine.device import accelerator_type
from zoo.core.machine.launcher_env import speaks
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import Degrees
from zoo.core.model.answers import overridden, parsed
from zoo.core.model.inventory import model_facts
from zoo.core.plan.auto import with_degrees
from zoo.core.plan.choices import choose_attention, choose_policy, describe_layout
from zoo.core.plan.origin import Origin, named_by_source, open_origin
from zoo.core.plan.resolve import Resolver
from zoo.core.plan.schemes import choose_schemes, settled
from zoo.core.registry.answers import check_fields, wrong
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import PluginStatus
from zoo.core.sequence.row_layout import BALANCES
from zoo.core.storage.published import Trained, generation_ends, hub_files
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.core.tokenizer.turn_end import TurnEnd, turn_end
from zoo.core.tokenizer.vocabulary import check_vocabulary

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
_MASK_NOTES = {
    "prefix": "prompts (what comes before the first trained token) are seen whole, the rest is causal",
    "full": "every token sees its whole document, the label it is trained on included",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job with nothing left open."""

    job: Job
    origin: Origin
    config: Any
    hub_config: Mapping[str, Any]
    """config.json of the model as trained, for checkpoints and export."""
    layout: Layout
    backend: AttentionBackend
    adapters: Sequence[ParallelAdapter]
    policy: MemoryPolicy
    notes: Sequence[tuple[str, str]]
    """What was chosen and why, as (topic, sentence)."""

    @property
    def spec(self) -> ModelSpec:
        return self.origin.spec

    @property
    def source(self) -> HubCheckpoint | None:
        """Where weights come from; None for random ones."""
        return self.origin.checkpoint

    @property
    def out(self) -> Path:
        assert self.job.checkpoint.out is not None, "prepare() names every run"
        return Path(self.job.checkpoint.out)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of the data, with the template that was given; loaded when first asked for.

        Raises DataError if it cannot be loaded, UsageError if it has tokens that the model has not.
        """
        tokenizer = Tokenizer.from_directory(self.origin.tokenizer_path, chat_template=self.job.data.chat_template)
        check_vocabulary(tokenizer, self.config.vocab_size)
        return tokenizer

    @cached_property
    def turn_end(self) -> TurnEnd | None:
        """What ends a turn under the chat template; None if there is no template."""
        return turn_end(self.tokenizer)

    @property
    def ending(self) -> str:
        """What to say of where generation will stop: a token that the source does not stop at, or none; else ""."""
        turn = self.turn_end
        if turn is None:
            return ""
        if turn.id is None:
            return f"warning: at no token after a turn, so generation goes on there: {turn.why}"
        before = generation_ends(self.origin.tokenizer_path, self.hub_config)
        if turn.id in before:
            return ""
        named, instead = self.tokenizer.decode([turn.id]), ", ".join(map(str, before)) or "none"
        return f"at {named!r} ({turn.id}) too, which ends a turn; the model it comes from stops at {instead}"

    @cached_property
    def hub_files(self) -> Mapping[str, bytes]:
        """The files beside the weights of every checkpoint, as they are when first asked for."""
        checkpoint = self.origin.checkpoint
        turn = self.turn_end.id if self.turn_end else None
        trained = Trained(
            config=self.hub_config,
            length=self.job.data.seq,
            longest=self.config.max_position_embeddings,
            native=self.spec.parse(checkpoint.config).max_position_embeddings if checkpoint else None,
            ends=tuple(id for id in (self.tokenizer.eos_id, turn) if id is not None),
            template=self.job.data.chat_template,
        )
        return hub_files(self.origin.tokenizer_path, trained)

    def open_rows(self, registry: Registry) -> RowStream:
        """The rows that are trained on, from the first on. Raises DataError or UsageError."""
        data = self.job.data
        return open_rows(
            registry,
            data=str(data.path),
            data_format=data.format,
            tokenizer=self.tokenizer,
            seq=data.seq,
            seed=data.seed,
            overlong=data.overlong,
            loss_on=data.loss_on,
            vocab_size=self.config.vocab_size,
        )


def prepare(job: Job, registry: Registry, *, world_size: int | None = None, machine: Machine | None = None) -> Prepared:
    """Decide everything that is open in a job and check the whole. Host only; the same answer on every rank.

    `world_size` is given inside a launcher, `machine` where it is not this one. Raises UsageError, FitError,
    PluginError or DataError.
    """
    _check_values(job)
    origin = open_origin(job, registry)
    if not job.data.path:
        raise UsageError(f"what should {job.model.name} be trained on? Give --data FILE, DIRECTORY or GLOB")
    open_source(registry, job.data.path)
    _check_trackers(job, registry)
    job, hub_config, config, longer = _for_length(job, origin, registry)
    _check_windows(job, origin, config)
    dtype = job.model.dtype if job.model.dtype != "auto" else "bfloat16" if accelerator_type() else "float32"
    resolver = Resolver(
        registry=registry,
        machine=machine or Machine.here(world_size=world_size, nproc=job.launch.nproc),
        model=model_facts(origin.entry.name, origin.spec, config),
        dtype=dtype,
        deterministic=job.model.deterministic,
    )
    job, why_degrees = with_degrees(job, resolver) if job.layout.degrees == "auto" else (job, ())
    resolved = resolver.resolve(job)
    job, layout = resolved.job, resolved.layout
    backend, why_backend = choose_attention(job, registry, layout.problems)
    schemes, why_schemes = choose_schemes(registry, layout, job.attention.mask)
    policy, why_policy = choose_policy(job, registry, config, layout.degrees, dtype)
    job = settled(_settled(job, dtype, layout.degrees, backend, policy), schemes)
    layout = replace(layout, schemes=schemes)
    job = job.replace("checkpoint", out=job.checkpoint.out or _default_out(job, origin))
    notes = (
        ("run", f"{job.checkpoint.out} (the same command resumes it)"),
        ("model", f"{origin.entry.name} {origin.size}, {origin.sentence}{longer}"),
        ("data", f"{job.data.path}, rows of {format_tokens(job.data.seq)} tokens, {layout.global_batch} a step"),
        ("layout", describe_layout(resolved.adapters, layout.degrees)),
        *why_degrees,
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
        config=config,
        hub_config=hub_config,
        layout=layout,
        backend=backend,
        adapters=resolved.adapters,
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
    origin = open_origin(job, registry, needs_weights=False)
    job, _hub_config, config, _longer = _for_length(job, origin, registry)
    dtype = "bfloat16" if job.model.dtype == "auto" else job.model.dtype
    facts = model_facts(entry.name, origin.spec, config)
    return job, Resolver(registry=registry, machine=machine, model=facts, dtype=dtype)


def with_recipe(registry: Registry, *layers: Settings) -> Job:
    """The job of layers (file, `--set`, flags) over what the family suggests for the size that is meant.

    Where no layer names the family, the checkpoint to start from does. Raises UsageError if there is none.
    """
    job = Job.from_settings(*layers)
    if not job.model.name:
        job = Job.from_settings({"model.name": (named_by_source(job, registry), "config.json")}, *layers)
    entry: ModelEntry = registry.models.get(job.model.name)
    size = Origin.size_of(job, entry)
    said = f"recipe of {entry.name} {size}"
    recipe: Settings = {key: (value, said) for key, value in entry.recipes.get(size, {}).items()}
    return Job.from_settings({"model.name": (entry.name, said), **recipe}, *layers)


def _joined(sentences: Sequence[str]) -> list[str]:
    """Return one sentence of all, if there are any."""
    return ["; ".join(sentences)] if sentences else []


def _check_trackers(job: Job, registry: Registry) -> None:
    """Raise UsageError or PluginError for a tracker that cannot be had. Only the first rank needs them."""
    for tracker in job.log.track if speaks() else ():
        registry.trackers.load(tracker)


def _check_values(job: Job) -> None:
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


def _for_length(job: Job, origin: Origin, registry: Registry) -> tuple[Job, dict[str, Any], Any, str]:
    """The job with its row length, the config for rows of that length, and what to say if it is more than native."""
    spec, hub_config = origin.spec, dict(origin.hub_config)
    config = parsed(spec, hub_config)
    seq, native = job.data.seq or config.max_position_embeddings, config.max_position_embeddings
    job = job.replace("data", seq=seq)
    if seq <= native:
        return job, hub_config, config, ""
    change = registry.rope_for_length(origin.entry.name, hub_config, seq)
    said = f"; it knows {format_tokens(native)} tokens, now {format_tokens(seq)}"
    # What was set by hand goes over what a plugin thinks best.
    change = {key: value for key, value in (change or {}).items() if key not in job.model.overrides}
    if not change:
        return job, hub_config, config, said
    by = registry.decider("zoo_rope_for_length")
    longer, longer_config = _lengthened(spec, hub_config, change, by)
    changed = ", ".join(f"{key} {value}" for key, value in change.items())
    return job, longer, longer_config, f"{said} ({changed}{f', by plugin {by.label}' if by else ''})"


def _lengthened(
    spec: ModelSpec, hub_config: Mapping[str, Any], change: Mapping[str, Any], by: PluginStatus | None
) -> tuple[dict[str, Any], Any]:
    """The fields and the config with what a plugin changes. Raises PluginError for what the family does not take."""
    check_fields(by, change, {*hub_config, *spec.optional_fields})
    try:
        longer = overridden(spec, hub_config, change)
        return longer, parsed(spec, longer)
    except DataError as error:
        raise wrong(
            f"plugin {by.label if by else '?'}",
            "zoo_rope_for_length",
            str(dict(change)),
            f"fields that the family reads; {str(error).removeprefix('config.json: ')}",
        ) from None


def _check_windows(job: Job, origin: Origin, config: Any) -> None:
    """Raises UsageError where a sliding window has no meaning under the job's mask."""
    narrow = next((window for window in origin.spec.windows(config) if window is not None), None)
    if narrow is not None and job.attention.mask != "causal":
        raise UsageError(
            f"attention.mask is {job.attention.mask} and {origin.entry.name} has layers with a sliding window of "
            f"{narrow} tokens, which narrows a causal mask only; leave attention.mask causal"
        )


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


def _default_out(job: Job, origin: Origin) -> str:
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
