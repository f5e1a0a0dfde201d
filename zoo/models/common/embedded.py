"""The small trained checkpoint that ships in a family's folder, where it has been put there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def embedded_config(folder: Path, otherwise: Mapping[str, Any]) -> Mapping[str, Any]:
    """The checkpoint's own config.json, so that there is one truth; `otherwise` where there is none to read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise
    return found if isinstance(found, dict) else otherwise


def embedded_sizes(folder: Path) -> dict[str, str]:
    """The size `tiny` to its directory, if a checkpoint is there."""
    return {"tiny": str(folder)} if (folder / "config.json").is_file() else {}
