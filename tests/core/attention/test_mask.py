"""A mask says exactly what its documents say, and refuses documents that overlap or leave the row."""

import pytest
from hypothesis import given

from tests.core.attention.draw import masks, patient, visible
from zoo.core.attention.mask import Mask
from zoo.core.errors import DataError


@patient
@given(masks())
def test_area_counts_visible_pairs(mask):
    assert mask.area == len(visible(mask))


@patient
@given(masks())
def test_documents_are_found_by_position_and_by_range(mask):
    for position in range(mask.length):
        found = [d for d in mask.documents if d[0] <= position < d[1]]
        assert mask.document_at(position) == (found[0] if found else None)
        stop = min(position + 7, mask.length)
        wanted = tuple(d for d in mask.documents if d[0] < stop and d[1] > position)
        assert mask.documents_in(position, stop) == wanted


def test_whole_is_one_document():
    assert Mask.whole(5) == Mask(5, ((0, 5),))
    assert Mask.whole(0).area == 0


@pytest.mark.parametrize("documents", [((3, 3),), ((0, 4), (3, 6)), ((4, 6), (0, 2)), ((0, 11),), ((-1, 2),)])
def test_wrong_documents_are_named(documents):
    with pytest.raises(DataError, match="10-token row: documents must be non-empty, ascending"):
        Mask(10, documents)
