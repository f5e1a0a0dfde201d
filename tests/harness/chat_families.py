"""Twelve well-known chat templates, written anew from their documentation, each with a small vocabulary that fits it.

A comment `generation` in a template marks what `{% generation %}` would: the oracle renders that variant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer as Backend

from tools.made_tokenizer import write_tokenizer

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """What a vocabulary must have for a template."""

    base: str
    """Of `made_tokenizer`."""
    bos: str | None
    eos: str
    flagged: tuple[str, ...] = ()
    unflagged: tuple[str, ...] = ()
    """Added tokens that are not flagged as special."""
    features: frozenset[str] = frozenset()
    """What conversations may have: system, tools, parallel (tool calls), roles in any order (free)."""


_LLAMA = Family(
    "llama3",
    "<|begin_of_text|>",
    "<|eot_id|>",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    features=frozenset({"system", "tools", "free"}),
)
_QWEN = Family(
    "chatml",
    None,
    "<|im_end|>",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"),
    frozenset({"system", "tools", "parallel", "free"}),
)
_DEEPSEEK_CALLS = tuple(
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in (
        "calls\u2581begin",
        "calls\u2581end",
        "call\u2581begin",
        "call\u2581end",
        "outputs\u2581begin",
        "outputs\u2581end",
        "output\u2581begin",
        "output\u2581end",
        "sep",
    )
)
_DEEPSEEK = Family(
    "llama3",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", *_DEEPSEEK_CALLS, "<think>", "</think>"),
    frozenset({"system", "tools", "parallel", "free"}),
)
_MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")

FAMILIES = {
    "llama3": _LLAMA,
    "llama31": _LLAMA,
    "llama32": _LLAMA,
    "qwen25": _QWEN,
    "qwen3": _QWEN,
    "chatml": _QWEN,
    "mistral": Family(
        "mistral", "<s>", "</s>", (*_MISTRAL, "[/TOOL_RESULTS]"), (), frozenset({"system", "tools", "parallel"})
    ),
    "mixtral": Family("mistral", "<s>", "</s>"),
    "nemotron": Family("mistral", "<s>", "</s>", ("<extra_id_0>", "<extra_id_1>"), (), frozenset({"system", "tools"})),
    "deepseek": _DEEPSEEK,
    "r1distill": _DEEPSEEK,
    "gemma": Family("mistral", "<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
}


def template_of(name: str, *, marked: bool = False) -> str:
    """Return a template, with `{% generation %}` around what an assistant generates if `marked`."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if not marked:
        return text
    for word in ("generation", "endgeneration"):
        text = text.replace(f"{{#- {word} -#}}", f"{{%- {word} -%}}")
    return text


def write_family(folder: Path, name: str, family: Family | None = None) -> Path:
    """Write a tokenizer's directory with a family's template and its markers, or others."""
    family = family or FAMILIES[name]
    path = write_tokenizer(folder, family.base)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.flagged])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.unflagged])
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    config["chat_template"] = template_of(name)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
