"""Sliding windows in a config.json: none ('llama'), one in every layer ('mistral'), one in some ('ministral').

transformers ignores `sliding_window` in a 'llama' config, so it is ignored here; set by hand it makes a Llama what the
hub calls a Mistral: the same weights under the same names, each token seeing the last `sliding_window` ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo import DataError
from zoo.models.common import Fields

Windows = tuple[int | None, ...]

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULT = 4096
"""transformers' own, where the field is absent; null means no window."""


def read_windows(fields: Fields, model_type: str, num_layers: int) -> Windows:
    """The window of each layer by the fields of a config.json. Raises DataError."""
    if model_type == "llama":
        return (None,) * num_layers
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        window = None
    else:
        window = fields.integer("sliding_window", _DEFAULT, high=1 << 32)
    if model_type == "mistral" or not fields.has("layer_types"):
        return (window,) * num_layers
    types = fields.values["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= {_SLIDING, _FULL}:
        raise fields.wrong("layer_types", f"it must list {num_layers} of '{_SLIDING}' and '{_FULL}'")
    if window is None and _SLIDING in types:
        raise DataError(f"config.json: layer_types has '{_SLIDING}' and sliding_window is not set")
    return tuple(window if kind == _SLIDING else None for kind in types)


def hub_windows(windows: Windows, model_type: str) -> dict[str, Any]:
    """The fields of a 'mistral' or 'ministral' config.json that say which layer has which window."""
    window = next((window for window in windows if window is not None), None)
    if model_type == "mistral":
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": [_FULL if w is None else _SLIDING for w in windows]}


def override_windows(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model type that can say what was set. Raises DataError if nothing can."""
    changed = dict(fields)
    window, types = over.get("sliding_window"), over.get("layer_types")
    if types is not None:
        changed["model_type"] = "ministral"
        if changed.get("sliding_window") is None and isinstance(types, list) and _SLIDING in types:
            raise DataError("model.layer_types has sliding layers: set model.sliding_window too, in tokens")
    elif window is not None and fields["model_type"] == "llama":
        changed["model_type"] = "mistral"
    return changed
