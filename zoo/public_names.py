"""The names of a public package: each is imported when it is first used, and old spellings say the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Groups = Mapping[str, Mapping[str, Sequence[str]]]
"""Title of a group to module to the names in it."""


def modules_of(groups: Groups) -> dict[str, str]:
    """Return name to module. Raises ValueError if a name is in two places."""
    found: dict[str, str] = {}
    for modules in groups.values():
        for module, names in modules.items():
            for name in names:
                if name in found:
                    raise ValueError(f"'{name}' is listed twice, for {found[name]} and {module}")
                found[name] = module
    return found


def lazy_getattr(package: str, groups: Groups, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names are in `groups`.

    `renamed` maps a deprecated name to its new spelling, as `zoo.Mask`. It works for one more release, with a
    DeprecationWarning.
    """
    modules = modules_of(groups)

    def getattr_of_package(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        if name not in renamed:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        spelling = renamed[name]
        warnings.warn(
            f"{package}.{name} is deprecated and will be removed in the next release; write {spelling}",
            DeprecationWarning,
            stacklevel=2,
        )
        home, _, new_name = spelling.rpartition(".")
        return getattr(importlib.import_module(home), new_name)

    return getattr_of_package
