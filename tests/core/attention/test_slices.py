"""Slices cover exactly the visible pairs, each once, in few rectangles; needs are exactly what is seen from afar."""

import random

from hypothesis import given, strategies as st

from tests.core.attention.draw import layouts, masks, pairs, patient, positions, visible
from tests.harness.work import lines_run
from zoo.core.attention.needs import remote_needs, rows_needed
from zoo.core.attention.slices import Step, local_slices, remote_slices
from zoo.core.contracts.attention import AttentionSlice, SliceRule
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import union

FULL, CAUSAL, ANTICAUSAL = SliceRule


@patient
@given(st.data(), masks())
def test_slices_cover_the_mask_exactly_once(data, mask):
    layout = data.draw(layouts(mask.length))
    covered, area = [], 0
    for rank, chunks in enumerate(layout.chunks):
        others = union(part for r, parts in enumerate(layout.chunks) if r != rank for part in parts)
        near, far = local_slices(mask, chunks), remote_slices(mask, chunks, others)
        covered += pairs(near, positions(chunks), positions(chunks)) + pairs(far, positions(chunks), positions(others))
        area += sum(s.area for s in near + far)
        assert all(s.area > 0 for s in near + far)
    assert sorted(covered) == sorted(visible(mask))
    assert area == mask.area


@patient
@given(st.data(), masks())
def test_needs_are_the_keys_that_other_ranks_see(data, mask):
    layout = data.draw(layouts(mask.length))
    owner = {row: rank for rank, chunks in enumerate(layout.chunks) for row in positions(chunks)}
    wanted = {(owner[k], owner[q], k) for q, k in visible(mask) if owner[q] != owner[k]}
    needs = remote_needs(mask, layout)
    ranks = range(layout.degree)
    found = {(o, r, k) for o in ranks for r in ranks for k in positions(rows_needed(needs, o, r))}
    assert found == wanted


def test_a_window_is_triangles_on_both_sides_of_a_band():
    """Row i sees keys i-3 to i: a causal triangle every 4 rows, and below it one row less, the other way round."""
    assert local_slices(Mask.whole(10, window=4), ((0, 10),)) == (
        AttentionSlice(0, 4, 0, 4, CAUSAL),
        AttentionSlice(4, 8, 4, 8, CAUSAL),
        AttentionSlice(4, 7, 1, 4, ANTICAUSAL),
        AttentionSlice(8, 10, 8, 10, CAUSAL),
        AttentionSlice(8, 10, 5, 7, ANTICAUSAL),
        AttentionSlice(8, 10, 7, 8, FULL),
    )
    assert len(local_slices(Mask.whole(10, window=10), ((0, 10),))) == 1


def test_a_prefix_is_a_rectangle_beside_the_triangle():
    mask = Mask(8, ((0, 8),), prefixes=(3,))
    assert local_slices(mask, ((0, 8),)) == (AttentionSlice(0, 8, 0, 3, FULL), AttentionSlice(3, 8, 3, 8, CAUSAL))


def test_a_window_needs_no_more_than_it_reaches():
    layout = SequenceLayout.contiguous(64, 4)
    for owner, rank, rows in ((0, 1, ((9, 16),)), (1, 2, ((25, 32),)), (0, 2, ()), (2, 1, ())):
        assert rows_needed(remote_needs(Mask.whole(64, window=8), layout), owner, rank) == rows


def test_one_document_on_one_rank_is_one_causal_slice():
    assert local_slices(Mask.whole(10), ((0, 10),)) == (AttentionSlice(0, 10, 0, 10, CAUSAL),)


def test_head_and_tail_of_a_document_are_one_causal_slice():
    layout = SequenceLayout.head_tail(16, 2)
    assert local_slices(Mask.whole(16), layout.chunks[0]) == (AttentionSlice(0, 8, 0, 8, CAUSAL),)


def test_neighbouring_pieces_that_see_the_same_keys_are_one_slice():
    mask, layout = Mask.whole(24), SequenceLayout.head_tail(24, 3)
    assert remote_slices(mask, layout.chunks[1], layout.chunks[0][:1]) == (AttentionSlice(0, 8, 0, 4, FULL),)
    assert remote_slices(mask, layout.chunks[0], layout.chunks[1]) == (AttentionSlice(4, 8, 0, 8, FULL),)


def test_a_step_is_shifted_to_the_box_around_its_slices():
    step = Step.around([AttentionSlice(4, 6, 10, 13, FULL), AttentionSlice(6, 9, 8, 11, CAUSAL)])
    assert step == Step((4, 9), (8, 13), (AttentionSlice(0, 2, 2, 5, FULL), AttentionSlice(2, 5, 0, 3, CAUSAL)))
    assert Step.around([]) == Step((0, 0), (0, 0), ())


def test_the_cost_of_remote_slices_does_not_grow_with_documents_inside_chunks():
    length, layout = 1 << 16, SequenceLayout.head_tail(1 << 16, 64)
    others = union(part for parts in layout.chunks[1:] for part in parts)
    cost = {}
    for documents in (1000, 16_000):
        cuts = sorted(random.Random(0).sample(range(1, length), documents))
        mask = Mask(length, tuple(zip([0, *cuts], [*cuts, length])))
        cost[documents] = lines_run(lambda mask=mask: remote_slices(mask, layout.chunks[0], others))
    # Going through the documents of two chunks alone, 500 of the 16,000, would be more lines.
    assert cost[16_000] < cost[1000] + 100
