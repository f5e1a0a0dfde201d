"""A mask says exactly what its documents say, and refuses documents that overlap or leave the row."""

import pytest
from hypothesis import given

from tests.core.attention.draw import masks, patient, visible
from zoo.core.errors import DataError
from zoo.core.sequence.mask import Mask


@patient
@given(masks())
def test_area_counts_visible_pairs(mask):
    assert mask.area == len(visible(mask))


@patient
@given(masks())
def test_documents_are_found_by_position_and_by_range(mask):
    for position in range(mask.length):
        found = [d for d in mask.documents if d[0] <= position < d[1]]
        at = mask.document_at(position)
        assert (at and (at.start, at.stop)) == (found[0] if found else None)
        stop = min(position + 7, mask.length)
        wanted = [d for d in mask.documents if d[0] < stop and d[1] > position]
        assert [(d.start, d.stop) for d in mask.documents_in(position, stop)] == wanted


@patient
@given(masks())
def test_reach_is_what_a_query_sees(mask):
    seen = visible(mask)
    for query in range(mask.length):
        document = mask.document_at(query)
        if document is not None:
            assert [k for q, k in sorted(seen) if q == query] == list(range(*mask.reach(document, query)))


def test_whole_is_one_document():
    assert Mask.whole(5) == Mask(5, ((0, 5),))
    assert Mask.whole(0).area == 0


def test_windows_and_prefixes_that_mean_nothing_are_refused():
    with pytest.raises(DataError, match="window is at least 1 and narrows a causal mask"):
        Mask.whole(10, window=0)
    for mask in (Mask.whole(10, causal=False), Mask(10, ((0, 10),), prefixes=(3,))):
        with pytest.raises(DataError, match="narrows a causal mask"):
            mask.with_window(4)
        assert mask.with_window(None) is mask
    for prefixes in ((3,), (3, 7), (-1, 2)):
        with pytest.raises(DataError, match="one each, from 0 to its length"):
            Mask(10, ((0, 4), (4, 10)), prefixes=prefixes)
    with pytest.raises(DataError, match="widen a causal mask"):
        Mask(10, ((0, 10),), causal=False, prefixes=(3,))


@pytest.mark.parametrize("documents", [((3, 3),), ((0, 4), (3, 6)), ((4, 6), (0, 2)), ((0, 11),), ((-1, 2),)])
def test_wrong_documents_are_named(documents):
    with pytest.raises(DataError, match="10-token row: documents must be non-empty, ascending"):
        Mask(10, documents)
