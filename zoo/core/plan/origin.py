"""Where a model comes from: its family, size, checkpoint, config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from zoo.core.contracts.checkpoints import Converter, HubCheckpoint
from zoo.core.contracts.entries import ModelEntry
from zoo.core.contracts.models import ModelSpec
from zoo.core.errors import DataError, UsageError, did_you_mean
from zoo.core.job.job import Job
from zoo.core.machine.device import accelerator_type
from zoo.core.model.answers import check_kv_heads, hub_fields, loaded_spec, overridden, parsed
from zoo.core.plan.chosen import Chosen
from zoo.core.registry.answers import located, opened
from zoo.core.registry.decisions import Registry
from zoo.core.tokenizer.files import has_vocabulary

SCRATCH = "scratch"
"""`--from scratch`: random weights."""

_SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
"""What models of one family and another size differ in; the vocabulary or the context may differ within a size."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model before training."""

    entry: ModelEntry
    spec: ModelSpec
    size: str
    checkpoint: HubCheckpoint | None
    """None for random weights."""
    hub_config: Mapping[str, Any]
    """config.json's fields in the family's own form, `--set model.*` applied."""
    tokenizer_path: Path

    @staticmethod
    def size_of(job: Job, entry: ModelEntry) -> str:
        """What `--size` means when not said: the embedded one where nothing accelerates, else the family's default."""
        if job.model.size or job.model.source not in (None, SCRATCH):
            return job.model.size or Path(str(job.model.source)).name
        return next(iter(entry.embedded), entry.default_size) if accelerator_type() is None else entry.default_size


def choose_origin(job: Job, registry: Registry, *, needs_weights: bool = True) -> Chosen[ModelSource]:
    """Find and open what a job starts from. Raises UsageError, PluginError or DataError.

    Without `needs_weights` a published size stands for its checkpoint, and nothing is said of a tokenizer.
    """
    entry: ModelEntry = registry.models.get(job.model.name)
    spec = loaded_spec(registry.models, job.model.name)
    size = ModelSource.size_of(job, entry)
    known = list(entry.sizes)
    if size not in entry.sizes and job.model.source in (None, SCRATCH):
        hint = did_you_mean(size, known)
        raise UsageError(
            f"{entry.name} has no size '{size}'{f' ({hint})' if hint else ''}. Sizes: {', '.join(known)}; "
            f"--from DIR takes a checkpoint of any other"
        )
    if size in entry.kv_heads:
        check_kv_heads(spec, entry, size, parsed(spec, entry.sizes[size]))
    if not needs_weights and job.model.source is None:
        fields = _overridden(entry.sizes[size], job, spec)
        known_size = ModelSource(
            entry=entry, spec=spec, size=size, checkpoint=None, hub_config=fields, tokenizer_path=Path()
        )
        return Chosen(known_size, _said_of(None))
    source = job.model.source or entry.embedded.get(size) or entry.hub_ids.get(size)
    if source is None:
        raise UsageError(f"{entry.name} {size} has no published checkpoint; give --from DIR, or --from {SCRATCH}")
    checkpoint = None if source == SCRATCH else _opened(source, entry, registry)
    if checkpoint and job.model.source:
        _check_size(job.model.size, checkpoint, entry)
    hub_config = checkpoint.config if checkpoint else entry.sizes[size]
    found = ModelSource(
        entry=entry,
        spec=spec,
        size=size,
        checkpoint=checkpoint,
        hub_config=_overridden(hub_config, job, spec),
        tokenizer_path=_tokenizer_path(entry, checkpoint),
    )
    return Chosen(found, _said_of(checkpoint))


def _said_of(checkpoint: HubCheckpoint | None) -> str:
    """Return where weights come from, in words."""
    if checkpoint is None:
        return "random weights"
    none = checkpoint.own_names and checkpoint.checksums is None
    return f"weights from {checkpoint.path}{' (it has no checksums, so unchecked)' if none else ''}"


def _check_size(size: str | None, checkpoint: HubCheckpoint, entry: ModelEntry) -> None:
    """Raise UsageError if `--size` names another model than `--from` holds: its recipe and name would be wrong."""
    if not size:
        return
    meant, found = entry.sizes.get(size), checkpoint.config
    names = [name for name in _SIZE_FIELDS if meant and name in meant and name in found and meant[name] != found[name]]
    if meant is not None and not names:
        return
    what = (
        f"its {names[0]} is {found[names[0]]}, and {meant[names[0]]} of {size}"
        if meant
        else f"{entry.name} has no such size"
    )
    raise UsageError(
        f"--size {size} is not what {checkpoint.path} holds: {what}. Leave out --size: with --from, any size is trained"
    )


def open_checkpoint(source: str, registry: Registry) -> HubCheckpoint:
    """A checkpoint by hub id or directory, in any form a plugin reads. Raises UsageError or DataError."""
    converters: dict[str, Converter] = registry.converters.made()
    for name, converter in converters.items():
        for path in registry.converters.asked(lambda converter: located(converter, source), {name: converter}).values():
            if path is not None:
                return opened(converter, path)
    forms = ", ".join([*registry.converters.others(""), *registry.passed_over()]) or "none"
    what = "holds no checkpoint" if Path(source).exists() else "does not exist, and is no hub id of the form owner/name"
    raise UsageError(f"{source} {what} (forms known here: {forms}; a Hugging Face directory has a config.json)")


def named_by_source(job: Job, registry: Registry) -> str:
    """Return the family of the checkpoint that a job starts from. Raises UsageError if it names none."""
    source = job.model.source
    if source in (None, SCRATCH):
        raise UsageError(
            f"which model? Type `zoo models` for the families, then for example: zoo finetune llama3"
            f"{f' --from {SCRATCH}' if source else ''}"
        )
    return family_of(open_checkpoint(source, registry), source, registry)


def family_of(checkpoint: HubCheckpoint, source: str, registry: Registry) -> str:
    """Return the family that a checkpoint's config.json belongs to. Raises UsageError if no plugin knows it."""
    family = registry.match_checkpoint(checkpoint.config)
    if family is None:
        kind = checkpoint.config.get("model_type")
        said = f"its config.json says model_type {kind!r:.80}" if kind else "its config.json has no model_type"
        known = sorted({name for entry in registry.models for name in (entry.model_type, *entry.other_types)})
        raise UsageError(
            f"{source}: {said}, which no family here knows; known: {', '.join(known) or 'none'} (zoo models)"
        )
    return family


def _opened(source: str, entry: ModelEntry, registry: Registry) -> HubCheckpoint:
    """The checkpoint, if it belongs to the family."""
    checkpoint = open_checkpoint(source, registry)
    family = family_of(checkpoint, source, registry)
    if family != entry.name:
        kind = checkpoint.config.get("model_type")
        other = f"zoo finetune {family} --from {quote(source)}"
        raise UsageError(f"{source} is not a {entry.name} checkpoint, its model_type is '{kind}'; {other}")
    return checkpoint


def _overridden(hub_config: Mapping[str, Any], job: Job, spec: ModelSpec) -> dict[str, Any]:
    """The fields with the job's `model.*` keys over them. An unknown key is a UsageError."""
    known = hub_fields(spec, parsed(spec, hub_config))
    names = sorted({*known, *spec.optional_fields})
    for key in job.model.overrides:
        if key not in names:
            hint = did_you_mean(key, [*names, "size", "from", "dtype"])
            said = f"unknown key 'model.{key}'{f' ({hint})' if hint else ''}"
            raise UsageError(f"{said}. Fields of {spec.name}: {', '.join(names)}")
    try:
        return overridden(spec, known, job.model.overrides)
    except DataError as error:
        if not job.model.overrides:
            raise
        # The file itself was read above, so it is what was set over it.
        raise UsageError(f"--set model.*: {str(error).removeprefix('config.json: ')}") from None


def _tokenizer_path(entry: ModelEntry, checkpoint: HubCheckpoint | None) -> Path:
    """The checkpoint's own directory, or for random weights the one that ships with the family."""
    shipped = entry.tokenizer or next(iter(entry.embedded.values()), None)
    if checkpoint is None and shipped is None:
        raise UsageError(
            f"--from {SCRATCH}: {entry.name} ships no tokenizer, so text cannot become tokens; give --from DIR, a "
            f"checkpoint with its tokenizer"
        )
    path = checkpoint.path if checkpoint else Path(str(shipped))
    if not has_vocabulary(path):
        raise DataError(
            f"{path} has no tokenizer.json, so text cannot become tokens; copy the tokenizer files of the checkpoint "
            f"there, or give --from a directory that has them"
        )
    return path
