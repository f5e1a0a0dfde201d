"""A mask cut by a layout: what travels as `Batch.mask` under context parallelism, with the plan all layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.core.attention.answers import check_plan, is_first
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

if TYPE_CHECKING:
    from zoo.core.contracts.attention import ContextPlan, ContextScheme, HeadShape, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """How the ranks of one context-parallel group reach each other's keys."""

    scheme: ContextScheme
    link: Link


Question = tuple[Any, "int | None", "HeadShape"]
"""What a plan is made for beside mask and layout: scheme, window, heads."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardedMask:
    """One rank's view of a row that several ranks hold. Host only."""

    mask: Mask
    layout: SequenceLayout
    rank: int
    asked: set[Question] = field(default_factory=set, repr=False)
    """What layers asked for so far; shared by the masks of a run, so that the next one can answer beforehand."""
    _plans: dict[Question, ContextPlan] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Tokens of this rank."""
        return self.layout.local_length(self.rank)

    def plan(self, scheme: ContextScheme, window: int | None, heads: HeadShape) -> ContextPlan:
        """The scheme's plan, made once per batch for all layers with the same window and heads."""
        question = (scheme, window, heads)
        if question not in self._plans:
            self.asked.add(question)
            plan = scheme.plan(self.mask.with_window(window), self.layout, self.rank, heads)
            if is_first(scheme, "plan"):
                check_plan(scheme, plan)
            self._plans[question] = plan
        return self._plans[question]

    def prepare(self) -> None:
        """Make the plans that layers will ask for, as far as earlier batches tell."""
        for question in list(self.asked):
            self.plan(*question)
