"""What each context scheme would do for one layer: work, balance, traffic and time, from its plans alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zoo.core.attention.forecast import BACKWARD_FLOPS, FORWARD_FLOPS, Rates, forecast_stages, sent_bytes
from zoo.core.attention.needs import remote_needs
from zoo.core.contracts.attention import ContextScheme, Forecast, HeadShape, Stage
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import Range, count, union
from zoo.core.sequence.row_layout import row_layout

Ways = tuple[tuple[Stage, ...], tuple[Stage, ...]]
"""Stages of a rank, forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one layer in one direction, forward or backward."""

    busiest: int
    """That the rank that sends most sends."""
    total: int
    """That all ranks send."""
    needed: int
    """All K/V rows (backward: and their gradients) once for each rank whose queries see them."""
    bound: int
    """The same rows once each: what no scheme that leaves queries where they are can undercut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One scheme, one layer, one row."""

    layout: str
    """How rows are shared out, in words."""
    executed: int
    """Scores computed over all ranks, times query heads: the area of all slices."""
    minimal: int
    """Scores that the mask shows, times query heads."""
    imbalance: float
    """Scores of the busiest rank over those of the mean one."""
    forward: Traffic
    backward: Traffic
    forecast: Forecast

    @property
    def excess(self) -> float:
        """Executed over minimal FLOPs; 1 where nothing is to be computed."""
        return self.executed / self.minimal if self.minimal else 1.0


def survey(
    scheme: ContextScheme, mask: Mask, degree: int, heads: HeadShape, rates: Rates, *, balance: str = "auto"
) -> Figures:
    """Figures of a scheme for a row seen through `mask`, from the plans of all `degree` ranks. Host only."""
    layout = layout_for(scheme, mask, degree, balance=balance)
    plans = [scheme.plan(mask, layout, rank, heads) for rank in range(degree)]
    stages = [plan.stages(rates.value_bytes, rates.gradient_bytes) for plan in plans]
    executed = [sum(stage.scores for stage in ahead) for ahead, _ in stages]
    once, each = remote_rows(mask, layout)
    row = 2 * heads.num_kv_heads * heads.head_dim
    forward, backward = rates.value_bytes * row, (rates.value_bytes + rates.gradient_bytes) * row
    return Figures(
        layout=layout_name(layout),
        executed=sum(executed),
        minimal=mask.area * heads.num_heads,
        imbalance=max(executed) * degree / sum(executed) if sum(executed) else 1.0,
        forward=_traffic(stages, 0, needed=each * forward, bound=once * forward),
        backward=_traffic(stages, 1, needed=each * backward, bound=once * backward),
        forecast=forecast_stages(stages, heads, rates),
    )


def layout_for(scheme: ContextScheme, mask: Mask, degree: int, *, balance: str = "auto") -> SequenceLayout:
    """The layout that a model whose layers all see `mask` would have with this scheme."""
    plain = replace(mask, window=None)
    return row_layout(plain, {mask.window: 1}, degree, balance=balance, splits_rows=scheme.splits_rows)


def layout_name(layout: SequenceLayout) -> str:
    """`contiguous`, `head-tail`, or `balanced` with the most chunks a rank has."""
    if layout == SequenceLayout.contiguous(layout.length, layout.degree):
        return "contiguous"
    if layout == SequenceLayout.head_tail(layout.length, layout.degree):
        return "head-tail"
    return f"balanced/{max(map(len, layout.chunks))}"


def remote_rows(mask: Mask, layout: SequenceLayout) -> tuple[int, int]:
    """Rows that a rank other than their owner sees: each counted once, and once for each such rank."""
    owned: dict[int, list[Range]] = defaultdict(list)
    read: dict[tuple[int, int], list[Range]] = defaultdict(list)
    for need in remote_needs(mask, layout):
        owned[need.owner].append(need.rows)
        for rank in need.ranks:
            read[need.owner, rank].append(need.rows)
    return sum(count(union(rows)) for rows in owned.values()), sum(count(union(rows)) for rows in read.values())


def layer_flops(scores: int, heads: HeadShape) -> int:
    """FLOPs of one layer's attention, forward and backward, over so many scores of all query heads."""
    return (FORWARD_FLOPS + BACKWARD_FLOPS) * heads.head_dim * scores


def _traffic(stages: Sequence[Ways], way: int, *, needed: int, bound: int) -> Traffic:
    sent = [sent_bytes(ways[way]) for ways in stages]
    return Traffic(busiest=max(sent), total=sum(sent), needed=needed, bound=bound)
