"""The Llama-3 family as a plugin."""

from __future__ import annotations

from zoo import ModelEntry
from zoo.models.common import TINY_RECIPE, Family
from zoo.models.llama3.sizes import EMBEDDED, HUB_IDS, MODEL_TYPE, MODEL_TYPES, PARAMETERS, SIZES

ZOO_PLUGIN_API = 1

_family = Family(
    ModelEntry(
        name="llama3",
        target="zoo.models.llama3.model:SPEC",
        help="Llama 3, 3.1, 3.2 and 3.3, and whatever the hub calls 'llama', 'mistral' or 'ministral'",
        model_type=MODEL_TYPE,
        other_types=tuple(kind for kind in MODEL_TYPES if kind != MODEL_TYPE),
        sizes=SIZES,
        default_size="8b",
        hub_ids=HUB_IDS,
        parameters=PARAMETERS,
        embedded=EMBEDDED,
        recipes={"tiny": TINY_RECIPE},
    ),
    for_length="zoo.models.llama3.config:for_length",
)

zoo_register_models = _family.zoo_register_models
zoo_match_checkpoint = _family.zoo_match_checkpoint
zoo_rope_for_length = _family.zoo_rope_for_length
zoo_check_layout = _family.zoo_check_layout
