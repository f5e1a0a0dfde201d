"""The files beside the weights as a run writes them: its source's, byte for byte, but for what training changed.

Three facts are changed where they have become wrong: the chat template, the longest text, and the tokens at which
generation stops. Each stands in several files, of which loaders prefer one or the other; here they agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.core.storage.companions import GENERATION, TEMPLATE, companion_names
from zoo.core.tokenizer.files import CONFIG as TOKENIZER_CONFIG, TEMPLATES, read_object

CONFIG, _EOS = "config.json", "eos_token_id"
_UNLIMITED = 10**20
"""transformers writes 10**30 as `model_max_length` of a tokenizer that knows no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run knows of its model that the source's files may say otherwise."""

    config: Mapping[str, Any]
    """config.json of the model as trained."""
    length: int
    """Tokens of a row."""
    longest: int
    """`max_position_embeddings` as trained."""
    native: int | None
    """The same of the source; None for random weights, whose tokenizer was another model's."""
    ends: tuple[int, ...]
    """Tokens that end what the model says."""
    template: str | None
    """File of the chat template that was given, if one was."""


def hub_files(source: Path, trained: Trained) -> dict[str, bytes]:
    """Return a checkpoint's files by name, config.json among them. Raises OSError or DataError."""
    names = [name for name in companion_names(source) if trained.template is None or not _is_template(name)]
    files = {name: (source / name).read_bytes() for name in names}
    if trained.template is not None:
        files[TEMPLATE] = Path(trained.template).read_bytes()
    for name, change in ((TOKENIZER_CONFIG, _tokenizer_config), (GENERATION, _generation)):
        if name in files:
            said = read_object(source / name)
            changed = change(said, trained)
            # What is right already keeps its bytes.
            files[name] = files[name] if changed == said else _json(changed)
    return files | {CONFIG: _json(_config(trained))}


def generation_ends(source: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens at which a source's generation stops: by generation_config.json, else by config.json."""
    return token_ids(read_object(source / GENERATION).get(_EOS)) or token_ids(config.get(_EOS))


def token_ids(said: Any) -> tuple[int, ...]:
    """Return the ids that a field such as `eos_token_id` names: one, several, or none."""
    ids = said if isinstance(said, list | tuple) else (said,)
    return tuple(id for id in ids if isinstance(id, int) and not isinstance(id, bool) and id >= 0)


def _is_template(name: str) -> bool:
    return name in (TEMPLATE, "chat_template.json") or name.startswith(f"{TEMPLATES}/")


def _tokenizer_config(said: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    changed = dict(said)
    if trained.template is not None:
        changed.pop("chat_template", None)
    limit = changed.get("model_max_length")
    if isinstance(limit, int | float) and limit < _UNLIMITED:
        follows = trained.native in (None, limit)
        changed["model_max_length"] = max(trained.longest if follows else limit, trained.length)
    return changed


def _generation(said: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    # generate() takes an absent field for no end at all, whatever config.json says.
    return _with_ends(said, token_ids(said.get(_EOS)) or token_ids(trained.config.get(_EOS)), trained)


def _config(trained: Trained) -> dict[str, Any]:
    return _with_ends(trained.config, token_ids(trained.config.get(_EOS)), trained)


def _with_ends(fields: Mapping[str, Any], ids: Sequence[int], trained: Trained) -> dict[str, Any]:
    """The fields with the trained ends among their end tokens, after those that were there."""
    if set(trained.ends) <= set(token_ids(fields.get(_EOS))):
        return dict(fields)
    every = list(dict.fromkeys((*ids, *trained.ends)))
    return {**fields, _EOS: every[0] if len(every) == 1 else every}


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(fields), indent=2, ensure_ascii=False) + "\n").encode()
