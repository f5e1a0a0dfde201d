"""The globs of a plan: which submodules of a model they name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from zoo.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def matches(name: str, glob: str) -> bool:
    """Whether a dotted name matches a glob in which `*` is exactly one atom."""
    atoms, patterns = name.split("."), glob.split(".")
    return len(atoms) == len(patterns) and all(fnmatchcase(a, p) for a, p in zip(atoms, patterns, strict=True))


def find_modules(model: nn.Module, glob: str) -> list[str]:
    """Names of the submodules a glob matches, in module order. Raises UsageError if there is none."""
    found = [name for name, _ in model.named_modules() if matches(name, glob)]
    if not found:
        raise UsageError(f"the plan's glob '{glob}' matches no module of {type(model).__name__}")
    return found
