"""Replacing the parameterless submodules of a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from zoo.core.errors import UsageError


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


def replace_modules(model: nn.Module, glob: str, wrap: Callable[[nn.Module], nn.Module], *, owner: str) -> int:
    """Replace each matching submodule by `wrap(old)` and return how many there were.

    Parameter names never change, so checkpoints, optimizers and rules stay valid. Raises UsageError if a match
    holds parameters or if nothing matches.
    """
    found = find_modules(model, glob)
    for name in found:
        old = model.get_submodule(name)
        new = wrap(old)
        if any(True for _ in old.parameters()) or any(True for _ in new.parameters()):
            raise UsageError(f"'{owner}' cannot replace '{name}': a seam has no parameters, and this one does")
        model.set_submodule(name, new)
    return len(found)
