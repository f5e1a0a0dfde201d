"""The Llama-3 family as a plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.core.entries import ModelEntry, load_target
from zoo.core.hookspecs import hookimpl
from zoo.models.llama3.sizes import EMBEDDED, HUB_IDS, MODEL_TYPE, MODEL_TYPES, PARAMETERS, SIZES

if TYPE_CHECKING:
    from zoo.core.contracts import LayoutRequest

ZOO_PLUGIN_API = 1
NAME = "llama3"


@hookimpl
def zoo_register_models() -> Sequence[ModelEntry]:
    return [
        ModelEntry(
            name=NAME,
            target="zoo.models.llama3.model:SPEC",
            help="Llama 3, 3.1, 3.2 and 3.3, and whatever the hub calls 'llama', 'mistral' or 'ministral'",
            model_type=MODEL_TYPE,
            sizes=SIZES,
            default_size="8b",
            hub_ids=HUB_IDS,
            parameters=PARAMETERS,
            embedded=EMBEDDED,
            # The corpus the tiny model was trained on, at a rate and length that show something within minutes.
            recipes={"tiny": {"data.path": "stdlib", "optim.lr": 1e-3, "schedule.steps": 6}},
        )
    ]


@hookimpl(trylast=True)
def zoo_match_checkpoint(config: Mapping[str, Any]) -> str | None:
    return NAME if config.get("model_type") in MODEL_TYPES else None


@hookimpl(trylast=True)
def zoo_rope_for_length(model: str, config: Mapping[str, Any], seq: int) -> Mapping[str, Any] | None:
    if model != NAME:
        return None
    fields: Mapping[str, Any] = load_target("zoo.models.llama3.config:for_length")(config, seq)
    return fields


@hookimpl
def zoo_check_layout(request: LayoutRequest) -> str | None:
    if request.model != NAME:
        return None
    objection: str | None = load_target("zoo.models.common.rope_parameters:dynamic_objection")(request)
    return objection
