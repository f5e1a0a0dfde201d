"""Llama-Nemotron models found by architecture search, as a plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.core.entries import ModelEntry, load_target
from zoo.core.hookspecs import hookimpl
from zoo.models.nemotron_nas.sizes import KV_HEADS, MODEL_TYPE, PARAMETERS, SIZES

if TYPE_CHECKING:
    from zoo.core.contracts import LayoutRequest

ZOO_PLUGIN_API = 1
NAME = "nemotron-nas"


@hookimpl
def zoo_register_models() -> Sequence[ModelEntry]:
    return [
        ModelEntry(
            name=NAME,
            target="zoo.models.nemotron_nas.model:SPEC",
            help="Llama-Nemotron by architecture search: Llama blocks that differ and may lack parts; --from DIR",
            model_type=MODEL_TYPE,
            sizes=SIZES,
            default_size="tiny",
            parameters=PARAMETERS,
            kv_heads=KV_HEADS,
            recipes={"tiny": {"data.path": "stdlib", "optim.lr": 1e-3, "schedule.steps": 6}},
        )
    ]


@hookimpl(trylast=True)
def zoo_match_checkpoint(config: Mapping[str, Any]) -> str | None:
    return NAME if config.get("model_type") == MODEL_TYPE else None


@hookimpl(trylast=True)
def zoo_rope_for_length(model: str, config: Mapping[str, Any], seq: int) -> Mapping[str, Any] | None:
    if model != NAME:
        return None
    fields: Mapping[str, Any] = load_target("zoo.models.nemotron_nas.config:for_length")(config, seq)
    return fields


@hookimpl
def zoo_check_layout(request: LayoutRequest) -> str | None:
    if request.model != NAME:
        return None
    objection: str | None = load_target("zoo.models.common.rope_parameters:dynamic_objection")(request)
    return objection
