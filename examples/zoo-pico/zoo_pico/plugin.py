"""What this package offers. Imports no torch: the targets do, when they are used."""

import json
from pathlib import Path

from zoo import AttentionEntry, CommandEntry, ModelEntry, hookimpl
from zoo.models.common import Family

ZOO_PLUGIN_API = 1
TINY = Path(__file__).parent / "tiny"

# The hooks of a model family: its entry, how a config.json is recognised, how its RoPE is stretched for longer rows.
_family = Family(
    ModelEntry(
        name="pico",
        target="zoo_pico.model:SPEC",
        help="A decoder with squared ReLU and a sliding window, small enough to read",
        model_type="pico",
        sizes={"tiny": json.loads((TINY / "config.json").read_text())},
        default_size="tiny",
        parameters={"tiny": 30_944},
        embedded={"tiny": str(TINY)},
        recipes={"tiny": {"model.from": "scratch", "data.path": "stdlib", "optim.lr": 3e-3}},
    ),
    for_length="zoo_pico.config:for_length",
)
zoo_register_models = _family.zoo_register_models
zoo_match_checkpoint = _family.zoo_match_checkpoint
zoo_rope_for_length = _family.zoo_rope_for_length
zoo_check_layout = _family.zoo_check_layout


@hookimpl
def zoo_register_attention() -> list[AttentionEntry]:
    return [AttentionEntry(name="fp64", target="zoo_pico.kernel:Fp64", help="Float64 arithmetic for any input")]


@hookimpl
def zoo_register_commands() -> list[CommandEntry]:
    return [
        CommandEntry(
            name="compare-attn",
            target="zoo_pico.command:compare_attn",
            help="Say how far two attention backends are apart.",
        )
    ]
