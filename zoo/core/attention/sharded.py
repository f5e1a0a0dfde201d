"""A mask cut by a layout: what travels as `Batch.mask` under context parallelism, with the plan all layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from zoo.core.contracts import ContextScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """How the ranks of one context-parallel group reach each other's keys."""

    scheme: ContextScheme
    group: ProcessGroup


@dataclass(frozen=True, slots=True, eq=False)
class ShardedMask:
    """One rank's view of a row that several ranks hold. Host only."""

    mask: Mask
    layout: SequenceLayout
    rank: int
    _plans: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Tokens of this rank."""
        return self.layout.local_length(self.rank)

    def plan(self, scheme: ContextScheme) -> Any:
        """The scheme's plan, made once per batch however many layers ask."""
        if id(scheme) not in self._plans:
            self._plans[id(scheme)] = scheme.plan(self.mask, self.layout, self.rank)
        return self._plans[id(scheme)]
