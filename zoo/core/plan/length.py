"""How long rows are, and what the model's config must say for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo.core.contracts.models import ModelSpec
from zoo.core.errors import DataError
from zoo.core.humanize import format_tokens
from zoo.core.job.job import Job
from zoo.core.model.answers import overridden, parsed
from zoo.core.plan.chosen import Chosen
from zoo.core.plan.origin import ModelSource
from zoo.core.registry.answers import check_fields, wrong
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import PluginStatus


@dataclass(frozen=True, slots=True)
class Length:
    """The rows of a run, and the model as it is trained on them."""

    seq: int
    """Tokens of a row."""
    hub_config: Mapping[str, Any]
    """config.json's fields."""
    config: Any
    """The family's config."""


def choose_length(job: Job, origin: ModelSource, registry: Registry) -> Chosen[Length]:
    """Return the length of rows, and the model's config for it, in which a plugin may have changed RoPE."""
    spec, hub_config = origin.spec, dict(origin.hub_config)
    config = parsed(spec, hub_config)
    seq, native = job.data.seq or config.max_position_embeddings, config.max_position_embeddings
    if seq <= native:
        return Chosen(Length(seq, hub_config, config), "")
    change = registry.rope_for_length(origin.entry.name, hub_config, seq)
    said = f"it knows {format_tokens(native)} tokens, now {format_tokens(seq)}"
    # What was set by hand goes over what a plugin thinks best.
    change = {key: value for key, value in (change or {}).items() if key not in job.model.overrides}
    if not change:
        return Chosen(Length(seq, hub_config, config), said)
    by = registry.decider("zoo_rope_for_length")
    longer, longer_config = _lengthened(spec, hub_config, change, by)
    changed = ", ".join(f"{key} {value}" for key, value in change.items())
    aside = f"{changed}{f', by plugin {by.label}' if by else ''}"
    return Chosen(Length(seq, longer, longer_config), f"{said} ({aside})")


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
