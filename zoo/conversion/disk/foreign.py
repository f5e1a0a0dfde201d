"""What is no plain checkpoint of a model, though it lies in such a directory: adapters, quantised weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo import DataError
from zoo.conversion.disk.files import read_bounded
from zoo.core.storage.companions import ADAPTER_CONFIG

ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
"""Files that peft writes."""

_QUANTISED = ("quantization_config", "compression_config")
_METHOD = re.compile(r"[\w.-]{1,40}", re.ASCII)
_PLAIN = {
    "bitsandbytes": "M.from_pretrained('{path}').dequantize().save_pretrained('PLAIN')",
    "fp8": "M.from_pretrained('{path}', quantization_config=transformers.FineGrainedFP8Config(dequantize=True))"
    ".save_pretrained('PLAIN')",
    "mxfp4": "M.from_pretrained('{path}', quantization_config=transformers.Mxfp4Config(dequantize=True))"
    ".save_pretrained('PLAIN')",
}
"""How transformers writes the weights of a method out; the others only by a tool of their own, if at all."""


def adapter_refusal(path: Path) -> DataError:
    """Return the error about a directory that holds an adapter, alone or beside weights."""
    base = _base_model(path)
    merge = (
        f'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{path}').merge_and_unload().save_pretrained('MERGED')\""
    )
    if os.path.lexists(path / "model.safetensors") or os.path.lexists(path / "model.safetensors.index.json"):
        found = next(name for name in ADAPTER if os.path.lexists(path / name))
        return DataError(
            f"{path} has weights and an adapter beside them ({found}), which transformers would put on them and zoo "
            f"does not: take the adapter's files out to mean the weights alone, or merge both first: {merge}"
        )
    return DataError(
        f"{path} is an adapter{f' of {base}' if base else ''}, not a model: merge it into its base first and give "
        f"MERGED, with the tokenizer files copied there: {merge}"
    )


def check_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Raise DataError if a config.json says that its weights are quantised, with what makes plain ones of them."""
    field = next((name for name in _QUANTISED if config.get(name) is not None), None)
    if field is None:
        return
    method = _method(config[field])
    command = _PLAIN.get(method, "")
    plain = ', or write them out first: python -c "import transformers; M = transformers.AutoModelForCausalLM; '
    instead = f'{plain}{command.format(path=path)}"' if command else ""
    raise DataError(
        f"{path / 'config.json'}: {field} says that the weights are quantised ({method}), which cannot be trained; "
        f"use the checkpoint that they were made from{instead}. If they are plain, take {field} out"
    )


def _method(said: Any) -> str:
    """The name of a method as transformers knows it; bitsandbytes' own configs may leave it out."""
    fields = said if isinstance(said, Mapping) else {}
    method = fields.get("quant_method")
    if method is None and any(fields.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    return method if isinstance(method, str) and _METHOD.fullmatch(method) else "by a method it does not name"


def _base_model(path: Path) -> str:
    """What an adapter says it belongs to, if it says so readably."""
    try:
        said = json.loads(read_bounded(path / ADAPTER_CONFIG, 1 << 20)).get("base_model_name_or_path")
    except (DataError, ValueError, AttributeError, RecursionError):
        return ""
    return said[:120] if isinstance(said, str) and said.isprintable() else ""
