"""What authors of plugins test with. Names are imported when they are first used.

Public, as `zoo` is (docs/stability.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.public_names import Groups, lazy_getattr, modules_of

if TYPE_CHECKING:
    from zoo.testing.attention import (
        AttentionContract as AttentionContract,
    )
    from zoo.testing.traffic import (
        CollectiveCounter as CollectiveCounter,
        compared as compared,
    )

_GROUPS: Groups = {
    "Contracts": {"zoo.testing.attention": ("AttentionContract",)},
    "Traffic": {"zoo.testing.traffic": ("CollectiveCounter", "compared")},
}
"""Every public name, once. docs/api.md is written from it, and the imports above repeat it for type checkers."""

_RENAMED: dict[str, str] = {"Wire": "zoo.testing.CollectiveCounter"}
"""Deprecated name to its new spelling, for one release."""

# A type checker would take every name that it does not know for `Any`.
if not TYPE_CHECKING:
    __all__ = list(modules_of(_GROUPS))
    __getattr__ = lazy_getattr(__name__, _GROUPS, _RENAMED)

    def __dir__() -> list[str]:
        return sorted(__all__)
