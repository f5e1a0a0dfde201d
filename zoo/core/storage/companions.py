"""Files that belong to a checkpoint beside its config and weights: tokenizer, chat templates, generation, licence.

README.md is none of them: a model card speaks of one model, and what is written here is another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from zoo.core.tokenizer.files import FILES, TEMPLATES

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
ADAPTER_CONFIG = "adapter_config.json"
"""Where it is, transformers puts the adapter beside it on any weights."""

_NAMES = frozenset((*FILES, "sentencepiece.bpe.model", GENERATION))
_VERSIONED = re.compile(r"tokenizer\.model\.v\w{1,8}", re.ASCII)
_LICENCES = re.compile(
    r"(licen[cs]e|notice|copying|use_policy)(\w|-)*(\.(txt|md|rst|html|pdf))?", re.ASCII | re.IGNORECASE
)
_JINJA = re.compile(r"[\w-][\w.-]{0,99}\.jinja", re.ASCII)


def companion_names(directory: Path) -> tuple[str, ...]:
    """Return the names of a directory's companions, sorted; those of templates with a name are `folder/file`.

    Nothing is opened. Raises OSError if the directory cannot be listed.
    """
    names = os.listdir(directory)
    if TEMPLATES in names and os.path.isdir(directory / TEMPLATES):
        names += [f"{TEMPLATES}/{name}" for name in os.listdir(directory / TEMPLATES)]
    return tuple(sorted(name for name in names if is_companion(name)))


def is_companion(name: str) -> bool:
    """Return whether a path in a checkpoint directory is one of its companions."""
    folder, _, leaf = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and _JINJA.fullmatch(leaf) is not None
    return name in _NAMES or _VERSIONED.fullmatch(name) is not None or is_licence(name)


def is_licence(name: str) -> bool:
    """Return whether a companion says what may be done with a checkpoint, not what it is."""
    return _LICENCES.fullmatch(name) is not None
