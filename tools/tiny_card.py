"""What the embedded tiny model's directory says of itself: config.json, generation_config.json and README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW = 1024

_SHARED: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": WINDOW,
    # Both spellings, so that transformers 4 and 5 read the same base.
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a family's tiny model is."""

    title: str
    shape: str
    """The part of the first sentence that families differ in."""
    config: Mapping[str, Any]
    while_training: Mapping[str, Any] = field(default_factory=dict)
    """What differs in the config while it is trained: experts are kept evenly used."""


CARDS: Mapping[str, Card] = {
    "llama3": Card(
        title="Llama-3",
        shape="A Llama of 2 layers, hidden 128, 4 query heads and 2 key/value heads of 32, SwiGLU 256, tied embeddings",
        config=_SHARED
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "intermediate_size": 256,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": Card(
        title="Mixtral",
        shape="A Mixtral of 2 layers, hidden 128, 4 query heads and 2 key/value heads of 32, 8 experts of SwiGLU 128,\n"
        "two for each token, tied embeddings",
        config=_SHARED
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": True,
        },
        while_training={"output_router_logits": True},
    ),
    "nemotron": Card(
        title="Nemotron",
        shape="A Nemotron of 2 layers, hidden 128, 4 query heads and 2 key/value heads of 32, half of each rotated,\n"
        "squared ReLU 384, separate embedding and head",
        config=_SHARED
        | {
            "architectures": ["NemotronForCausalLM"],
            "model_type": "nemotron",
            "intermediate_size": 384,
            "hidden_act": "relu2",
            "norm_eps": 1e-05,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
    ),
}
"""By the name of the family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, and how it was made. Losses are nats a token on the held-out files."""

    unigram: float
    bigram: float
    loss_512: float
    loss_window: float
    plain_unigram: float
    plain_bigram: float
    plain_loss: float
    """The three without the generated tables under encodings/, which any model finds easy."""
    tokens_per_byte: float
    recall_512: float
    recall_window: float
    needles: int
    """How many needles each recall was measured on."""
    parameters: int
    seed: int
    steps: int
    tokens: int
    minutes: float
    python: str
    torch: str

    def bits_per_byte(self, loss: float) -> float:
        """Nats a token as bits a byte of UTF-8 text, a unit that does not depend on the tokenizer."""
        return loss * self.tokens_per_byte / 0.6931471805599453


def write_config(out: Path, family: str, *, bos: int, eos: int, pad: int, eot: int) -> None:
    """Write config.json and generation_config.json."""
    config = {**CARDS[family].config, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    generation = {"bos_token_id": bos, "eos_token_id": [eos, eot], "pad_token_id": pad}
    for name, fields in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(fields, indent=2) + "\n")


def write_readme(out: Path, family: str, figures: Figures) -> None:
    """Write README.md: what it is, how it was made, what was measured."""
    card = CARDS[family]
    text = _README.format(f=figures, table=_table(figures), window=WINDOW, card=card, family=family)
    (out / "README.md").write_text(text)


def _table(f: Figures) -> str:
    rows = [("unigram (add-k)", f.unigram), ("bigram (add-k)", f.bigram)]
    rows += [("this model, windows of 512", f.loss_512), (f"this model, windows of {WINDOW}", f.loss_window)]
    lines = [f"| {name} | {loss:.3f} | {f.bits_per_byte(loss):.3f} |" for name, loss in rows]
    return "\n".join(["| model | nats a token | bits a byte |", "|---|---|---|", *lines])


_README = """# tiny: the embedded {card.title} of zoo

{card.shape}, vocabulary 2048,
{f.parameters:,} parameters in float32, RoPE base 10,000, window {window}. It was trained from nothing on the source \
text
of the Python standard library, mixed with rows that hide needles in text and ask for them at the end. So it
models text a little, finds what it is asked for, and gives long-context fine-tuning something to extend.

Made by, from the root of the repository:

    python tools/train_tiny.py {family} --out zoo/models/{family}/tiny --seed {f.seed}

{f.steps:,} steps, {f.tokens:,} tokens, {f.minutes:.0f} minutes on two shared CPU cores, seed {f.seed}, \
torch {f.torch}, Python {f.python}.
Another Python has other source text, and another torch other roundings: the figures then differ a little.

## Held-out text

Every 20th file by a hash of its path was kept from the tokenizer, the counts and the training. Windows do not
overlap and start with no context. k of the add-k smoothing is the best one *on the held-out text*.

{table}

Without the generated tables under `encodings/`: unigram {f.plain_unigram:.3f}, bigram {f.plain_bigram:.3f}, \
this model {f.plain_loss:.3f} (windows of {window}).

## Recall

33 needles a row at even depths of held-out text, each asked for once at the end; a needle counts when both answer
tokens are the most likely ones, given all true tokens before them. {f.needles:,} needles for each length.

| row | recall |
|---|---|
| 512 | {f.recall_512:.3f} |
| {window} | {f.recall_window:.3f} |

A needle is `<|key|>` and nine digits, `<|key|>123456789`: a key and two values of three digits, one token each.
The question is `<|key|>123`.

## Tokenizer

Byte-level BPE learned on the same training files with Llama-3's split, one token for each of 000 to 999, Llama-3's
markers and `<|key|>`. Any text goes in and comes back. The chat template is Llama-3's header form; the model never
saw a conversation, so its markers are untrained.
"""
