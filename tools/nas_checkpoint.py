"""Llama-Nemotron models by architecture search: drawn configs, a checkpoint on disk, and their formula written anew."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from zoo.models.llama3.sizes import TINY as TOKENIZER
from zoo.models.nemotron_nas.model import SPEC
from zoo.models.nemotron_nas.sizes import SIZES


def save(directory: Path) -> Path:
    """The tiny size between blocks of nothing at all, with random weights and a borrowed tokenizer."""
    torch.manual_seed(0)
    nothing = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
    blocks = [nothing, *SIZES["tiny"]["block_configs"], nothing]
    fields = dict(SIZES["tiny"]) | {"num_hidden_layers": len(blocks), "block_configs": blocks}
    config = SPEC.parse(fields | {"initializer_range": 0.1})
    directory.mkdir(parents=True, exist_ok=True)
    save_file(SPEC.build(config).state_dict(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(SPEC.hub_config(config)))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    return directory


def draw_fields(seed: int) -> dict:
    """config.json fields; the first block has everything."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    divisors = [group for group in (1, 2, 3, 6) if heads % group == 0]

    def part(name: str, **more: object) -> dict:
        kind = draw.choice(["", "", "no_op", "replace_with_linear"]) if blocks else ""
        return {"no_op": kind == "no_op", "replace_with_linear": kind == "replace_with_linear"} | (
            dict.fromkeys(more, None) if kind else more
        )

    blocks: list[dict] = []
    for _ in range(draw.choice([1, 3, 6])):
        attention = part("attention", n_heads_in_group=draw.choice(divisors))
        width = draw.choice([{"ffn_mult": draw.choice([0.5, 2.625])}, {"intermediate_size": 72}])
        blocks.append({"attention": attention, "ffn": part("ffn", **width)})
    return {
        "model_type": "nemotron-nas",
        "vocab_size": 97,
        "hidden_size": heads * draw.choice([8, 12]),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "initializer_range": 0.2,
        "attention_bias": seed % 3 == 0,
        "mlp_bias": seed % 4 == 0,
        "tie_word_embeddings": seed % 2 == 0,
        "block_configs": blocks,
    }


def formula(weights: dict[str, torch.Tensor], fields: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` by weights in the hub's names, token by token of what the config says; nothing of zoo's."""
    heads = fields["num_attention_heads"]
    size = fields["hidden_size"] // heads
    h = weights["model.embed_tokens.weight"][tokens]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    for i, block in enumerate(fields["block_configs"]):
        layer, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            x = norm(f"{layer}.input_layernorm", h)
            if attention["replace_with_linear"]:
                h = h + linear(f"{layer}.self_attn.linear_attn", x)
            else:
                q, k, v = (_by_head(linear(f"{layer}.self_attn.{name}_proj", x), size) for name in "qkv")
                q, k = _turned(q, 5e5), _turned(k, 5e5)
                k, v = (t.repeat_interleave(attention["n_heads_in_group"], 1) for t in (k, v))
                future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
                scores = (q @ k.mT / size**0.5).masked_fill(future, float("-inf"))
                h = h + linear(f"{layer}.self_attn.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if not ffn["no_op"]:
            x = norm(f"{layer}.post_attention_layernorm", h)
            if ffn["replace_with_linear"]:
                h = h + linear(f"{layer}.mlp.linear_mlp", x)
            else:
                gate = linear(f"{layer}.mlp.gate_proj", x)
                h = h + linear(f"{layer}.mlp.down_proj", gate * gate.sigmoid() * linear(f"{layer}.mlp.up_proj", x))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm("model.norm", h) @ head.T


def _by_head(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Pairs (d, d + H/2) as complex numbers, times e^(i * position * theta^(-2d/H))."""
    half = x.shape[-1] // 2
    # The hub keeps frequencies in fp32.
    frequencies = (1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)).double()
    angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)
