"""What this package offers. Imports no torch: the targets do, when they are used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo import AttentionEntry, CommandEntry, ModelEntry, hookimpl

ZOO_PLUGIN_API = 1
TINY = Path(__file__).parent / "tiny"


@hookimpl
def zoo_register_models() -> list[ModelEntry]:
    return [
        ModelEntry(
            name="pico",
            target="zoo_pico.model:SPEC",
            help="A decoder with squared ReLU, small enough to read",
            model_type="pico",
            sizes={"tiny": json.loads((TINY / "config.json").read_text())},
            default_size="tiny",
            embedded={"tiny": str(TINY)},
            recipes={"tiny": {"model.from": "scratch", "data.path": "stdlib", "optim.lr": 3e-3}},
        )
    ]


@hookimpl
def zoo_match_checkpoint(config: Mapping[str, Any]) -> str | None:
    return "pico" if config.get("model_type") == "pico" else None


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
