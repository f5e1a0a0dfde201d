"""A layout gives every token to one rank, and takes and joins are inverse."""

import pytest
import torch
from hypothesis import given, strategies as st

from tests.core.attention.draw import layouts, patient, positions
from zoo.core.errors import UsageError
from zoo.core.sequence.layout import SequenceLayout


def test_head_tail_pairs_parts_from_both_ends():
    layout = SequenceLayout.head_tail(16, 2)
    assert layout.chunks == (((0, 4), (12, 16)), ((4, 12),))
    assert SequenceLayout.contiguous(16, 2).chunks == (((0, 8),), ((8, 16),))
    assert layout.degree == 2


def test_uneven_lengths_are_cut_at_rounded_down_parts():
    layout = SequenceLayout.head_tail(10, 3)
    assert layout.chunks == (((0, 1), (8, 10)), ((1, 3), (6, 8)), ((3, 6),))
    assert SequenceLayout.head_tail(3, 4).local_length(0) == 1


@patient
@given(st.data(), st.integers(1, 60))
def test_join_undoes_take(data, length):
    layout = data.draw(layouts(length))
    row = torch.arange(2 * length).reshape(2, length)
    parts = [layout.take(row, rank, 1) for rank in range(layout.degree)]
    for rank, part in enumerate(parts):
        assert part[0].tolist() == positions(layout.chunks[rank])
        assert part.shape[1] == layout.local_length(rank)
    assert torch.equal(layout.join(parts, 1), row)


@pytest.mark.parametrize(
    "chunks", [(((0, 4),), ((5, 8),)), (((0, 5),), ((4, 8),)), (((4, 8), (0, 4)),), (((0, 7),),), (((0, 8), (8, 8)),)]
)
def test_gaps_overlaps_and_disorder_are_refused(chunks):
    with pytest.raises(UsageError, match="exactly once"):
        SequenceLayout(8, chunks)


def test_no_rank_is_refused():
    with pytest.raises(UsageError, match="at least one rank, not 0"):
        SequenceLayout.contiguous(8, 0)
