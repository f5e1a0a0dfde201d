"""A model zoo for long-context fine-tuning. Names are imported when first used, so `import zoo` costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zoo.core.version import __version__

if TYPE_CHECKING:
    from zoo.core.api import finetune, load, plan
    from zoo.core.hookspecs import hookimpl

_TARGETS = {
    "load": "zoo.core.api",
    "finetune": "zoo.core.api",
    "plan": "zoo.core.api",
    "hookimpl": "zoo.core.hookspecs",
}

__all__ = ["__version__", "finetune", "hookimpl", "load", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _TARGETS:
        raise AttributeError(f"module 'zoo' has no attribute '{name}'")
    return getattr(importlib.import_module(_TARGETS[name]), name)


def __dir__() -> list[str]:
    return __all__
