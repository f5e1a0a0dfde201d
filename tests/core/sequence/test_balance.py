"""The balanced layout: equal tokens, equal area, few cuts, few K/V rows that travel, and quickly."""

import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from benchmarks.balance import KINDS, areas, imbalance, least_travelling, packed, travelling
from tests.core.attention.draw import patient
from tests.harness.work import lines_run
from zoo.core.errors import UsageError
from zoo.core.sequence.balance import RIGHT, SLACK, _Circle, _Row, balanced, visible_before_each
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask, visible_before

MILLION = 1 << 20


def token_areas(work):
    """Keys that each token sees, summed over layers, from the mask's own definition."""
    areas = [0] * work[0][0].length
    for mask, layers in work:
        for index in range(len(mask.documents)):
            document = mask.document(index)
            for query in range(document.start, document.stop):
                first, last = mask.reach(document, query)
                areas[query] += layers * (last - first)
    return areas


@st.composite
def works(draw, max_length=120):
    """Rows of any kind of mask with padding, as layers with one or two windows see them."""
    length = draw(st.integers(0, max_length))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=10)) | {0, length})
    kept = draw(st.lists(st.integers(0, 3), min_size=len(cuts), max_size=len(cuts)))
    documents = tuple(part for part, keep in zip(zip(cuts, cuts[1:]), kept) if keep)
    kind = draw(st.sampled_from(["causal", "window", "mixed", "full", "prefix"]))
    if kind == "prefix":
        prefixes = tuple(draw(st.integers(0, stop - start)) for start, stop in documents)
        return [(Mask(length, documents, prefixes=prefixes), draw(st.integers(1, 3)))]
    row = Mask(length, documents, causal=kind != "full")
    if kind in ("causal", "full"):
        return [(row, 2)]
    windowed = row.with_window(draw(st.integers(1, length + 2)))
    return [(windowed, 2)] if kind == "window" else [(row, 1), (windowed, 3)]


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


@patient
@given(works(), st.sampled_from([1, 2, 3, 4, 8, 17]))
def test_every_rank_gets_its_tokens_and_no_more_than_its_area(work, degree):
    layout = balanced(work, degree)
    length, seen = work[0][0].length, token_areas(work)
    assert layout.length == length
    assert layout.degree == degree
    assert {layout.local_length(rank) for rank in range(degree)} <= {length // degree, -(-length // degree)}
    # A window is within half a token of its share; what it takes too little is shared by the ranks that are left.
    grain = max(seen, default=0) * (0.5 + harmonic(degree))
    for rank, part in enumerate(layout.chunks):
        fair = sum(seen) * layout.local_length(rank) / max(1, length)
        assert sum(sum(seen[start:stop]) for start, stop in part) <= (1 + SLACK + RIGHT) * fair + grain
    assert sum(map(len, layout.chunks)) <= 2 * degree + 1
    starts = [part[0][0] for part in layout.chunks if part]
    assert starts == sorted(starts)
    assert all(layout.chunks[: len(starts)])


@patient
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.lists(st.tuples(st.none() | st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_areas_of_many_documents_are_those_of_each(offset, prefix, layers):
    found = visible_before_each(np.array([offset]), np.array([prefix]), tuple(layers))
    expected = [
        count * (visible_before(offset, prefix=prefix) if window is None else visible_before(offset, window=window))
        for window, count in layers
    ]
    assert found.tolist() == [sum(expected)]


@pytest.mark.parametrize(
    ("length", "degree"), [(MILLION, 64), (65_536, 8), (4096, 2), (1000, 4), (1003, 8), (40_037, 64)]
)
def test_one_causal_document_is_head_tail(length, degree):
    layout, expected = balanced([(Mask.whole(length), 1)], degree), SequenceLayout.head_tail(length, degree)
    # A rank with half a token too many has cuts elsewhere for its area: the farther, the nearer its two parts lie.
    exact = length % (2 * degree) == 0
    for found, wanted in zip(layout.chunks, expected.chunks, strict=True):
        assert np.abs(np.array(found) - np.array(wanted)).max() <= (0 if exact else degree // 2)


@pytest.mark.parametrize("mask", [Mask.whole(MILLION, window=1024), Mask.whole(MILLION, causal=False)])
def test_work_that_is_the_same_everywhere_is_cut_into_contiguous_parts(mask):
    layout = balanced([(mask, 1)], 64)
    assert all(len(part) == 1 for part in layout.chunks)
    assert layout == SequenceLayout.contiguous(MILLION, 64)


def test_a_giant_takes_turns_with_its_short_neighbours():
    documents = ((0, 512), *((i, i + 8) for i in range(512, 1024, 8)))
    layout = balanced([(Mask(1024, documents), 1)], 4)
    # Every rank works on the giant, which is nearly all the area, and its last part meets no other part of it.
    assert all(any(start < 512 for start, _ in part) for part in layout.chunks)
    (last,) = (part for part in layout.chunks if any(start < 512 <= stop for start, stop in part))
    assert len(last) == 1


def test_a_giant_far_from_the_ends_of_the_row_is_found():
    edges = [*range(0, 400_000, 250), *range(600_000, MILLION, 250), MILLION]
    mask = Mask(MILLION, tuple(zip(edges, edges[1:])))
    found = areas(mask, balanced([(mask, 1)], 64))
    assert max(found) <= 1.002 * min(found)


def test_a_cut_costs_the_rows_before_it_in_its_document_unless_it_is_there_already():
    row = Mask(100, ((0, 60), (60, 100)))
    circle = _Circle.of(_Row.of([(row, 1), (row.with_window(8), 2)]), ((30, 100), (0, 20)))
    # Places 0 and 70 are edges of stretches, 30 is position 60, a document's; 10, 40, 50 are positions 40, 70, 80.
    assert circle.cut_rows(np.array([0, 30, 10]), 40).tolist() == [10 + 2 * 7, 0, 40 + 20 + 4 * 7]


def test_only_padding_and_nothing_at_all():
    assert balanced([(Mask(10, ()), 1)], 4).degree == 4
    assert balanced([(Mask(0, ()), 1)], 3) == SequenceLayout(0, ((), (), ()))
    few = balanced([(Mask.whole(2), 1)], 5)
    assert [few.local_length(rank) for rank in range(5)] == [1, 1, 0, 0, 0]


def test_layers_are_weighed_by_their_number():
    row = Mask.whole(4096)
    windowed = row.with_window(64)
    assert balanced([(row, 1), (windowed, 10**6)], 4) == balanced([(windowed, 1)], 4)
    assert balanced([(row, 10**6), (windowed, 1)], 4) == SequenceLayout.head_tail(4096, 4)


def test_wrong_work_is_refused():
    row = Mask.whole(8)
    with pytest.raises(UsageError, match="at least one rank, not 0"):
        balanced([(row, 1)], 0)
    with pytest.raises(UsageError, match="mask of at least one layer"):
        balanced([], 2)
    for other in (
        Mask.whole(9),
        Mask.whole(8, causal=False),
        Mask(8, ((0, 4), (4, 8))),
        Mask(8, ((0, 8),), prefixes=(2,)),
    ):
        with pytest.raises(UsageError, match="masks of different rows"):
            balanced([(row, 1), (other, 1)], 2)


# Rows of the three distributions must be balanced to 5 %; what that costs in K/V rows beside contiguous, on average.
WORST_RATIO = {"files": 6.0, "log-normal": 6.0, "giant": 3.0, "short": 1.5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "degree"), [(65_536, 8), (65_536, 64), (MILLION, 8), (MILLION, 64)])
def test_real_rows_are_balanced_and_little_travels(kind, length, degree):
    rng = random.Random(f"{kind}{length}{degree}")
    rows = contiguous = floor = 0.0
    for _ in range(4 if kind == "short" else 12):
        mask = packed(kind, length, rng)
        layout = balanced([(mask, 1)], degree)
        assert imbalance(mask, layout) <= 1.05
        assert travelling(mask, layout) <= 0.76 * (degree - 1) * length
        assert travelling(mask, layout) >= least_travelling(mask, degree)
        rows += travelling(mask, layout)
        contiguous += travelling(mask, SequenceLayout.contiguous(length, degree))
        floor += least_travelling(mask, degree)
    assert rows <= WORST_RATIO[kind] * contiguous
    if kind == "giant":
        assert rows <= 1.15 * floor


@pytest.mark.parametrize("kind", [*KINDS, "whole", "windowed", "mixed"])
def test_a_million_tokens_and_64_ranks_cost_no_loop_over_tokens(kind):
    """As many lines of Python as take about 50 ms on a processor of 2024."""
    row = packed(kind, MILLION, random.Random(kind)) if kind in KINDS else Mask.whole(MILLION)
    row = packed("log-normal", MILLION, random.Random(kind)) if kind == "mixed" else row
    windowed = row.with_window(4096)
    work = {"windowed": [(windowed, 1)], "mixed": [(row, 8), (windowed, 24)]}.get(kind, [(row, 1)])

    assert lines_run(lambda: balanced(work, 64)) < 100_000
