"""Forecasts add up the stages of plans: what travels, what hides it, and the time that leaves."""

import random

import pytest

from tests.harness.work import lines_run
from zoo.core.attention.forecast import BACKWARD_FLOPS, FORWARD_FLOPS, Rates, forecast, sent_bytes
from zoo.core.contracts.attention import HeadShape, Stage
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.halo import Halo
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ulysses import Ulysses

HEADS = HeadShape(num_heads=8, num_kv_heads=2, head_dim=16)
LENGTH = 4096
K_AND_V = 2 * HEADS.num_kv_heads * HEADS.head_dim
"""Numbers of a row of K and V."""


def _rates(**changes):
    return Rates(**({"flops": 1e9, "link": 1e9, "value_bytes": 2, "gradient_bytes": 4} | changes))


class Told:
    """A scheme whose plans are told: for each rank the stages forward, and the same backward."""

    name = "told"

    def __init__(self, *ranks):
        self.ranks = ranks

    def plan(self, mask, layout, rank, heads):
        return ToldPlan(tuple(Stage(*stage) for stage in self.ranks[rank]))


class ToldPlan:
    def __init__(self, stages):
        self._stages = stages

    def stages(self, value_bytes, gradient_bytes):
        return self._stages, self._stages


def _told(*ranks, **changes):
    """Forecast of stages `(bytes, scores)` at one byte and one forward score a second."""
    flops = FORWARD_FLOPS * HEADS.head_dim
    layout = SequenceLayout.contiguous(8, len(ranks))
    return forecast(Told(*ranks), Mask.whole(8), layout, HEADS, _rates(flops=flops, link=1.0, **changes))


def test_a_stage_takes_as_long_as_the_longer_of_wire_and_work():
    back = BACKWARD_FLOPS / FORWARD_FLOPS  # what a score takes backward, in seconds
    found = _told([(10, 4), (0, 4), (2, 0)])
    assert found.sent == (12, 12)
    assert found.compute_seconds == pytest.approx(8 + 8 * back)
    assert found.seconds == pytest.approx((10 + 4 + 2) + (max(10, 4 * back) + 4 * back + 2))
    exposed = (6 + 2) + (max(0, 10 - 4 * back) + 2)
    assert found.hidden == pytest.approx(1 - exposed / 24)


def test_stages_of_ranks_end_together_and_bytes_are_the_busiest_ranks():
    found = _told([(10, 1), (0, 0)], [(0, 3), (1, 5)], [(4, 0), (4, 0)])
    back = BACKWARD_FLOPS / FORWARD_FLOPS
    assert found.sent == (10, 10)  # one rank's, not the sum of each stage's largest
    assert found.seconds == pytest.approx(10 + 5 + max(10, 3 * back) + 5 * back)
    assert found.compute_seconds == pytest.approx(8 + 8 * back)


def test_what_sends_nothing_hides_all_of_it():
    found = _told([(0, 5)])
    assert (found.hidden, found.sent) == (1.0, (0, 0))
    assert found.seconds == found.compute_seconds


def test_only_the_ranks_asked_for_are_planned():
    scheme = Told([(1, 0)], [(100, 0)])
    layout = SequenceLayout.contiguous(8, 2)
    assert forecast(scheme, Mask.whole(8), layout, HEADS, _rates(), ranks=[0]).sent == (1, 1)
    assert forecast(scheme, Mask.whole(8), layout, HEADS, _rates()).sent == (100, 100)
    assert sent_bytes([Stage(3, 9), Stage(4, 0)]) == 7


def test_the_ring_of_one_causal_document_costs_its_formula():
    degree = 8
    layout = SequenceLayout.head_tail(LENGTH, degree)
    rates = _rates(link=1e15)  # nothing to wait for
    found = forecast(Ring(), Mask.whole(LENGTH), layout, HEADS, rates)
    share = LENGTH // degree * K_AND_V
    assert found.sent[0] <= 2 * (degree - 1) * share
    assert found.sent[1] <= (2 + 4) * (degree - 1) * share
    scores = Mask.whole(LENGTH).area // degree * HEADS.num_heads
    assert found.compute_seconds == pytest.approx(14 * HEADS.head_dim * scores / rates.flops)
    assert 0.9 < found.hidden < 1.0  # the last gradients come home, which nothing hides
    assert found.compute_seconds <= found.seconds < 1.2 * found.compute_seconds


def test_a_slow_link_turns_the_choice_to_what_sends_less():
    """A small window: dealing heads out moves whole rows, the halo only what the window shows."""
    mask, layout = Mask.whole(LENGTH, window=64), SequenceLayout.contiguous(LENGTH, 4)
    for scheme in (Ring(), Allgather(), Ulysses()):
        there = forecast(scheme, mask, layout, HEADS, _rates(link=1e6))
        halo = forecast(Halo(), mask, layout, HEADS, _rates(link=1e6))
        assert halo.seconds <= there.seconds
        assert halo.sent[0] == 63 * K_AND_V * 2
    assert halo.seconds < there.seconds / 5  # ulysses
    assert halo.hidden < 1.0


def test_types_on_the_wire_are_counted():
    layout = SequenceLayout.head_tail(LENGTH, 4)
    wide, narrow = (
        forecast(Ring(), Mask.whole(LENGTH), layout, HEADS, _rates(value_bytes=value, gradient_bytes=gradient))
        for value, gradient in ((4, 4), (2, 2))
    )
    assert [2 * sent for sent in narrow.sent] == list(wide.sent)


def test_a_few_ranks_stand_for_all():
    mask, layout = Mask.whole(LENGTH), SequenceLayout.head_tail(LENGTH, 8)
    for scheme in (Ring(), Allgather(), Halo(), Ulysses()):
        every = forecast(scheme, mask, layout, HEADS, _rates())
        some = forecast(scheme, mask, layout, HEADS, _rates(), ranks=[0, 4, 7])
        assert some.seconds == pytest.approx(every.seconds, rel=0.05)


def test_a_forecast_is_quick_at_a_million_tokens():
    length = 1 << 20
    cuts = sorted(random.Random(0).sample(range(1, length), 299))
    mask, layout = Mask(length, tuple(zip([0, *cuts], [*cuts, length]))), SequenceLayout.head_tail(length, 64)

    def all_of_them():
        for scheme in (Ring(), Allgather(), Halo()):
            forecast(scheme, mask, layout, HEADS, _rates(), ranks=[0, 32, 63])

    # Fewer than there are tokens: about half a second on a processor of 2024.
    assert lines_run(all_of_them) < length
