"""Files that belong to a checkpoint beside its config and weights: tokenizer, chat templates, generation, licence.

README.md is none of them: a model card speaks of one model, and what is written here is another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
"""Templates with a name, `tool_use.jinja` say; the one folder whose files belong to a checkpoint."""

ADAPTER_CONFIG = "adapter_config.json"
"""Where it is, transformers puts the adapter beside it on any weights."""

_NAMES = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|tokenizer\.model(\.v\d{1,3})?|spiece\.model|sentencepiece\.bpe\.model|tekken\.json"
    r"|chat_template\.(jinja|json)|generation_config\.json",
    re.ASCII,
)
_LICENCES = re.compile(
    r"(licen[cs]e|notice|copying|use_policy)(\w|-)*(\.(txt|md|rst|html|pdf))?", re.ASCII | re.IGNORECASE
)
_TEMPLATES = re.compile(r"[\w-][\w.-]{0,99}\.jinja", re.ASCII)


def companion_names(directory: Path) -> tuple[str, ...]:
    """Return the names of a directory's companions, sorted; those of templates with a name are `folder/file`.

    Nothing is opened. Raises OSError if the directory cannot be listed.
    """
    names = os.listdir(directory)
    if TEMPLATE_FOLDER in names and os.path.isdir(directory / TEMPLATE_FOLDER):
        names += [f"{TEMPLATE_FOLDER}/{name}" for name in os.listdir(directory / TEMPLATE_FOLDER)]
    return tuple(sorted(name for name in names if is_companion(name)))


def is_companion(name: str) -> bool:
    """Return whether a path in a checkpoint directory is one of its companions."""
    folder, _, leaf = name.rpartition("/")
    if folder:
        return folder == TEMPLATE_FOLDER and _TEMPLATES.fullmatch(leaf) is not None
    return _NAMES.fullmatch(name) is not None or is_licence(name)


def is_licence(name: str) -> bool:
    """Return whether a companion says what may be done with a checkpoint, not what it is."""
    return _LICENCES.fullmatch(name) is not None
