"""The Nemotron family as a plugin."""

from __future__ import annotations

from zoo import ModelEntry
from zoo.models.common import TINY_RECIPE, Family
from zoo.models.nemotron.sizes import EMBEDDED, HUB_IDS, MODEL_TYPE, PARAMETERS, SIZES

ZOO_PLUGIN_API = 1

_family = Family(
    ModelEntry(
        name="nemotron",
        target="zoo.models.nemotron.model:SPEC",
        help="Nemotron-3, Nemotron-4 and Minitron: LayerNorm1P, squared ReLU, half of each head rotated",
        model_type=MODEL_TYPE,
        sizes=SIZES,
        default_size="minitron-8b",
        hub_ids=HUB_IDS,
        parameters=PARAMETERS,
        embedded=EMBEDDED,
        recipes={"tiny": TINY_RECIPE},
    ),
    for_length="zoo.models.nemotron.config:for_length",
)

zoo_register_models = _family.zoo_register_models
zoo_match_checkpoint = _family.zoo_match_checkpoint
zoo_rope_for_length = _family.zoo_rope_for_length
zoo_check_layout = _family.zoo_check_layout
