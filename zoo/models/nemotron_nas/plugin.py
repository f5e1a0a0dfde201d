"""Llama-Nemotron models found by architecture search, as a plugin."""

from __future__ import annotations

from zoo import ModelEntry
from zoo.models.common import TINY_RECIPE, Family
from zoo.models.nemotron_nas.sizes import KV_HEADS, MODEL_TYPE, PARAMETERS, SIZES, TOKENIZER

ZOO_PLUGIN_API = 1

_family = Family(
    ModelEntry(
        name="nemotron-nas",
        target="zoo.models.nemotron_nas.model:SPEC",
        help="Llama-Nemotron by architecture search: Llama blocks that differ and may lack parts; --from DIR",
        model_type=MODEL_TYPE,
        sizes=SIZES,
        default_size="tiny",
        parameters=PARAMETERS,
        kv_heads=KV_HEADS,
        tokenizer=TOKENIZER,
        recipes={"tiny": TINY_RECIPE},
    ),
    for_length="zoo.models.nemotron_nas.config:for_length",
)

zoo_register_models = _family.zoo_register_models
zoo_match_checkpoint = _family.zoo_match_checkpoint
zoo_rope_for_length = _family.zoo_rope_for_length
zoo_check_layout = _family.zoo_check_layout
