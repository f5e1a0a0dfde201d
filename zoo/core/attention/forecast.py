"""What a context scheme will cost, from its own plan: bytes, what hides them, and the time that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.core.attention.answers import stages_of
from zoo.core.contracts.attention import ContextScheme, Forecast, HeadShape, Stage
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

FORWARD_FLOPS = 4
"""FLOPs of a score and a number of a head: a multiply-add for q k^T, one for the weighted sum of v."""
BACKWARD_FLOPS = 10
"""Five matrix products instead of two: the scores are computed anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a rank computes and sends at."""

    flops: float
    """FLOP/s reached by attention."""
    link: float
    """Bytes a second out of a rank."""
    value_bytes: int
    """Bytes of a number of K/V on the wire."""
    gradient_bytes: int
    """Bytes of a number of dK/dV on the wire."""


def forecast(
    scheme: ContextScheme,
    mask: Mask,
    layout: SequenceLayout,
    heads: HeadShape,
    rates: Rates,
    *,
    ranks: Sequence[int] | None = None,
) -> Forecast:
    """The cost of one layer. Stages end together: each takes as long as the slowest of `ranks` (all by default).

    Ranks in the middle of a layout cost what their neighbours do, so a few stand for many where planning takes time.
    """
    ranks = range(layout.degree) if ranks is None else ranks
    plans = [scheme.plan(mask, layout, rank, heads) for rank in ranks]
    stages = [stages_of(scheme, plan, rates.value_bytes, rates.gradient_bytes) for plan in plans]
    return forecast_stages(stages, heads, rates)


def forecast_stages(
    stages: Sequence[tuple[tuple[Stage, ...], tuple[Stage, ...]]], heads: HeadShape, rates: Rates
) -> Forecast:
    """`forecast` from what plans said: the stages of some ranks, forward and backward each."""
    total, computing, exposed, travelling = 0.0, 0.0, 0.0, 0.0
    sent = []
    for way, flops in ((0, FORWARD_FLOPS), (1, BACKWARD_FLOPS)):
        per_score = flops * heads.head_dim / rates.flops
        columns = list(zip(*(stage[way] for stage in stages), strict=True))
        for column in columns:
            wire = max(stage.sent for stage in column) / rates.link
            work = max(stage.scores for stage in column) * per_score
            total += max(wire, work)
            exposed += max(0.0, wire - work)
            travelling += wire
        computing += max(sum(stage.scores for stage in ways[way]) for ways in stages) * per_score
        sent.append(max(sent_bytes(ways[way]) for ways in stages))
    return Forecast(
        sent=(sent[0], sent[1]),
        hidden=1 - exposed / travelling if travelling else 1.0,
        seconds=total,
        compute_seconds=computing,
    )


def sent_bytes(stages: Sequence[Stage]) -> int:
    """Bytes over all stages."""
    return sum(stage.sent for stage in stages)
