"""transformers' models beside ours: random small configs of every family it has too, the same weights in both."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tools.rounding import rounding
from zoo.core.contracts.models import Losses, ModelSpec
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.mixtral.model import SPEC as MIXTRAL
from zoo.models.nemotron.model import SPEC as NEMOTRON

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@dataclass(frozen=True)
class Family:
    """A family as transformers has it, and what its drawn configs vary beyond what all vary."""

    spec: ModelSpec
    config: type
    model: type
    more: Callable[[random.Random, int], dict[str, Any]]
    varied: tuple[str, ...]
    """Fields that the draws must have run through, both or several values each."""
    routes: bool = False
    """Whether tokens choose experts."""
    whole: tuple[str, ...] = ()
    """Modules that no parallelism cuts, as globs."""
    in_our_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """Tensors by transformers' names in memory, by ours; an independent word on the family's rules."""


def _llama(draw: random.Random, seed: int) -> dict[str, Any]:
    return {
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "attention_bias": seed % 3 == 0,
        "mlp_bias": seed % 4 == 0,
    }


def _nemotron(draw: random.Random, seed: int) -> dict[str, Any]:
    return {
        "norm_eps": draw.choice([1e-5, 1e-6]),
        "attention_bias": seed % 3 == 0,
        "mlp_bias": seed % 4 == 0,
        "partial_rotary_factor": draw.choice([0.5, 0.5, 0.25, 1.0]),
        "head_dim": draw.choice([16, 24, 40]),
    }


def _mixtral(draw: random.Random, seed: int) -> dict[str, Any]:
    """A window of 1 and a single choice leave queries and router without a gradient: other tests have those."""
    experts = draw.choice([2, 3, 5, 8])
    return {
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "sliding_window": draw.choice([None, 2, 7, 40]),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.choice([2, 2, min(3, experts)]),
    }


def _unfused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 holds Mixtral's w1 and w3 of all experts in one tensor, and says `mlp`."""
    found = {}
    for name, tensor in tensors.items():
        ours = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("gate_up_proj"):
            found[ours.replace("gate_up_proj", "w1")], found[ours.replace("gate_up_proj", "w3")] = tensor.chunk(2, 1)
        else:
            found[ours.replace("down_proj", "w2")] = tensor
    return found


BIASES = ("attention_bias", "mlp_bias")
FAMILIES = {
    "llama3": Family(LLAMA, transformers.LlamaConfig, transformers.LlamaForCausalLM, _llama, BIASES),
    "mixtral": Family(
        MIXTRAL,
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        _mixtral,
        ("sliding_window", "num_local_experts", "num_experts_per_tok"),
        routes=True,
        whole=("model.layers.*.block_sparse_moe.gate",),
        in_our_names=_unfused,
    ),
    "nemotron": Family(
        NEMOTRON,
        transformers.NemotronConfig,
        transformers.NemotronForCausalLM,
        _nemotron,
        (*BIASES, "partial_rotary_factor"),
    ),
}


def draw_fields(seed: int, family: str = "llama3") -> dict:
    """config.json fields of a small model; the seed runs through RoPE types, biases and ties.

    Weights are wide enough for attention to matter: where it is nearly uniform the gradient of a key is a small
    difference of large numbers, and two ways to round it agree to few digits.
    """
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    rope = list(ROPES)[seed % len(ROPES)]
    return {
        "model_type": FAMILIES[family].spec.model_type,
        "vocab_size": draw.choice([97, 256, 515]),
        "hidden_size": heads * draw.choice([8, 12, 20]),
        "intermediate_size": draw.choice([40, 96, 130]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([8, 16, 24]),
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": seed % 2 == 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES[family].more(draw, seed),
        "rope_parameters": ROPES[rope] | {"rope_theta": draw.choice([1e4, 5e5])},
    }


def family_of(fields: Mapping[str, Any]) -> Family:
    return next(family for family in FAMILIES.values() if family.spec.model_type == fields["model_type"])


def pair(fields: Mapping[str, Any], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """transformers' model with perturbed norms and biases, and ours with its weights."""
    torch.manual_seed(seed)
    family = family_of(fields)
    theirs = family.model(family.config(**fields, attn_implementation="sdpa"))
    if family.routes:
        theirs.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    ours = family.spec.build(family.spec.parse(fields))
    weights = family.in_our_names(dict(theirs.named_parameters(remove_duplicate=False)))
    ours.load_state_dict(weights, strict=True)
    return theirs, ours


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The sum of the token losses, whatever else the model has to say."""
    out = model(tokens, labels=labels)
    return out.tokens if isinstance(out, Losses) else out


def check_fp32(
    step: Callable[[], Mapping[str, Tensor]], *found: Mapping[str, Tensor]
) -> Callable[[str, Tensor], float]:
    """Assert that results of fp32 are what `step` computes in fp64 but for what fp32 may be off by."""
    share = rounding(step, torch.float32)
    for results in found:
        for name, value in results.items():
            assert share(name, value) <= 1, (name, share(name, value))
    return share


def check_logits(ours: nn.Module, expected: Tensor, *inputs: Tensor) -> Callable[[str, Tensor], float]:
    """The same of a model's logits and of those expected; the model is left in fp64."""
    found = {"logits": ours(*inputs)}
    return check_fp32(lambda: {"logits": ours.double()(*inputs)}, found, {"logits": expected})
