"""Mixtral's weights on disk: a tensor for each expert's matrix, as everybody reads it, or fused ones."""

from __future__ import annotations

from zoo import Part, Rename, Rule, Stack
from zoo.models.mixtral.config import MixtralConfig

_OURS = "model.layers.{i}.block_sparse_moe"
_FUSED = "model.layers.{i}.mlp"


def rules(_config: MixtralConfig) -> tuple[Rule, ...]:
    """Experts stacked from the hub's, one by one: what transformers 4 and 5, vLLM and llama.cpp all read."""
    return tuple(
        Stack(ours=f"{_OURS}.experts.{w}", hub=f"{_OURS}.experts.{{e}}.{w}.weight") for w in ("w1", "w2", "w3")
    )


def forms(config: MixtralConfig) -> tuple[tuple[Rule, ...], ...]:
    """The form transformers 5 holds in memory and can write: experts stacked, w1 above w3 in one tensor."""
    gate_up, inner = f"{_FUSED}.experts.gate_up_proj", config.intermediate_size
    fused = (
        Rename(ours=f"{_OURS}.gate.weight", hub=f"{_FUSED}.gate.weight"),
        Part(ours=f"{_OURS}.experts.w1", hub=gate_up, dim=1, start=0, total=2 * inner),
        Part(ours=f"{_OURS}.experts.w3", hub=gate_up, dim=1, start=inner, total=2 * inner),
        Rename(ours=f"{_OURS}.experts.w2", hub=f"{_FUSED}.experts.down_proj"),
    )
    return (fused,)
