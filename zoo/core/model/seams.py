"""Replacing the parameterless submodules of a model, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from zoo.core.contracts.globs import find_modules
from zoo.core.errors import UsageError


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
