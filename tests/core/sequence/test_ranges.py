"""Ranges behave as the sets of rows they stand for."""

from hypothesis import given, strategies as st

from tests.core.attention.draw import patient, positions
from zoo.core.sequence.ranges import RowIndex, complement, count, union

PARTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@patient
@given(PARTS)
def test_union_is_the_set_in_the_fewest_ranges(parts):
    merged = union(parts)
    rows = positions(merged)
    assert rows == sorted({row for start, stop in parts for row in range(start, stop)})
    assert count(merged) == len(rows)
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:]))


@patient
@given(PARTS)
def test_complement_is_what_is_left(parts):
    merged = union(parts)
    assert sorted(positions(merged) + positions(complement(merged, 31))) == list(range(31))


@patient
@given(PARTS, PARTS)
def test_row_index_finds_positions_in_the_rows_laid_end_to_end(parts, wanted):
    held = union(parts)
    rows = positions(held)
    index = RowIndex(held)
    assert [index.before(p) for p in range(32)] == [sum(row < p for row in rows) for p in range(32)]
    subset = union((max(a, start), min(b, stop)) for a, b in wanted for start, stop in held)
    assert [rows[at] for at in positions(index.locate(subset))] == positions(subset)
