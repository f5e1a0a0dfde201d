"""The Mixtral family as a plugin."""

from __future__ import annotations

from zoo import ModelEntry
from zoo.models.common import TINY_RECIPE, Family
from zoo.models.mixtral.sizes import EMBEDDED, HUB_IDS, MODEL_TYPE, PARAMETERS, SIZES

ZOO_PLUGIN_API = 1

_family = Family(
    ModelEntry(
        name="mixtral",
        target="zoo.models.mixtral.model:SPEC",
        help="Mixtral: tokens choose two of eight experts in every block",
        model_type=MODEL_TYPE,
        sizes=SIZES,
        default_size="8x7b",
        hub_ids=HUB_IDS,
        parameters=PARAMETERS,
        embedded=EMBEDDED,
        recipes={"tiny": TINY_RECIPE},
    ),
    for_length="zoo.models.mixtral.config:for_length",
    objections=("zoo.models.common.moe:balance_objection",),
)

zoo_register_models = _family.zoo_register_models
zoo_match_checkpoint = _family.zoo_match_checkpoint
zoo_rope_for_length = _family.zoo_rope_for_length
zoo_check_layout = _family.zoo_check_layout
