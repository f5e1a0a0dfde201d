"""A row gets head-tail where that is exact, contiguous where balance does not matter, and the solver's otherwise."""

import pytest
from hypothesis import given, strategies as st

from tests.core.attention.draw import masks, patient
from zoo.core.attention.slices import local_slices, remote_slices
from zoo.core.sequence.balance import balanced
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import union
from zoo.core.sequence.row_layout import BALANCES, row_layout

PLAIN = {None: 4}
PACKED = Mask(96, ((0, 5), (5, 31), (40, 77), (77, 96)))


def test_one_causal_document_is_head_tail():
    assert row_layout(Mask.whole(96), PLAIN, 4) == SequenceLayout.head_tail(96, 4)
    assert row_layout(Mask.whole(97), PLAIN, 4) == SequenceLayout.head_tail(97, 4)


@pytest.mark.parametrize(
    ("mask", "windows"),
    [
        (PACKED, PLAIN),
        (Mask(96, ((1, 96),)), PLAIN),
        (Mask.whole(96, causal=False), PLAIN),
        (Mask(96, ((0, 96),), prefixes=(30,)), PLAIN),
        (Mask.whole(96), {20: 4}),
        (Mask.whole(96), {None: 2, 20: 2}),
    ],
    ids=["packed", "padding", "full", "prefix", "window", "some windows"],
)
def test_everything_else_is_the_solvers(mask, windows):
    work = [(mask.with_window(window), layers) for window, layers in windows.items()]
    assert row_layout(mask, windows, 4) == balanced(work, 4)
    assert row_layout(mask, windows, 4, balance="balanced") == balanced(work, 4)


def test_windows_and_their_numbers_of_layers_count():
    mask = Mask(1000, ((0, 700), (700, 1000)))
    layouts = [row_layout(mask, windows, 4) for windows in ({None: 1}, {50: 1}, {None: 1, 50: 1}, {None: 1, 50: 31})]
    assert layouts[0] != layouts[1]
    for layout, (plain, windowed) in zip(layouts, ((1, 0), (0, 1), (1, 1), (1, 31)), strict=True):
        work = [(mask, plain), (mask.with_window(50), windowed)]
        areas = [sum(layers * _area(each, layout, rank) for each, layers in work) for rank in range(4)]
        assert max(areas) <= 1.05 * sum(areas) / 4


def _area(mask, layout, rank):
    others = union(part for r, parts in enumerate(layout.chunks) if r != rank for part in parts)
    near, far = local_slices(mask, layout.chunks[rank]), remote_slices(mask, layout.chunks[rank], others)
    return sum(s.area for s in near + far)


@pytest.mark.parametrize("mask", [Mask.whole(96), PACKED, Mask.whole(96, causal=False)])
def test_what_is_asked_for_is_done(mask):
    assert row_layout(mask, PLAIN, 4, balance="contiguous") == SequenceLayout.contiguous(96, 4)
    assert row_layout(mask, PLAIN, 4, balance="head-tail") == SequenceLayout.head_tail(96, 4)
    assert row_layout(mask, PLAIN, 4, balance="balanced") == balanced([(mask, 4)], 4)


def test_rows_that_nobody_computes_where_they_lie_stay_together():
    for mask in (Mask.whole(96), PACKED):
        assert row_layout(mask, PLAIN, 4, splits_rows=False) == SequenceLayout.contiguous(96, 4)
        for balance in ("head-tail", "balanced"):  # asked for all the same
            asked = row_layout(mask, PLAIN, 4, balance=balance, splits_rows=False)
            assert asked == row_layout(mask, PLAIN, 4, balance=balance)
            assert asked != SequenceLayout.contiguous(96, 4)


@patient
@given(masks(), st.sampled_from(BALANCES), st.booleans())
def test_one_rank_holds_the_row_as_it_is(mask, balance, splits_rows):
    layout = row_layout(mask, {mask.window: 2}, 1, balance=balance, splits_rows=splits_rows)
    assert layout.chunks == (((0, mask.length),),)


@patient
@given(masks(), st.sampled_from(BALANCES), st.integers(2, 8))
def test_any_mask_and_length_is_covered_and_shared_out_evenly(mask, balance, degree):
    layout = row_layout(mask, {None: 1}, degree, balance=balance)
    shares = [layout.local_length(rank) for rank in range(degree)]
    assert layout.length == sum(shares) == mask.length
    assert max(shares) - min(shares) <= 2


@patient
@given(masks(), st.integers(2, 5))
def test_the_layout_is_a_function_of_the_row(mask, degree):
    """All ranks come to the same one by themselves."""
    assert row_layout(mask, {None: 3}, degree) == row_layout(mask, {None: 3}, degree)
