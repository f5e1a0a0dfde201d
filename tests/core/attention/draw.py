"""Random rows for property tests: documents with and without padding, and how they are shared out."""

from hypothesis import settings
from hypothesis import strategies as st

from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask

# Examples take as long as the machine is busy, so time is no reason to fail.
patient = settings(deadline=None, max_examples=80)


@st.composite
def masks(draw, min_length=1, max_length=80):
    """Rows of documents between random cuts; some of the stretches are padding."""
    length = draw(st.integers(min_length, max_length))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=12)) | {0, length})
    stretches = list(zip(cuts, cuts[1:]))
    kept = draw(st.lists(st.integers(0, 3), min_size=len(stretches), max_size=len(stretches)))
    documents = tuple(part for part, keep in zip(stretches, kept) if keep)
    return Mask(length, documents, causal=draw(st.sampled_from([True, True, False])))


@st.composite
def layouts(draw, length, degrees=(1, 2, 3, 4, 8)):
    """The two built-in layouts, and chunks dealt out at random."""
    degree = draw(st.sampled_from(degrees))
    kind = draw(st.sampled_from(["head_tail", "contiguous", "dealt"]))
    if kind != "dealt":
        return getattr(SequenceLayout, kind)(length, degree)
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=10)) | {0, length})
    chunks = [[] for _ in range(degree)]
    for part in zip(cuts, cuts[1:]):
        chunks[draw(st.integers(0, degree - 1))].append(part)
    return SequenceLayout(length, tuple(map(tuple, chunks)))


def visible(mask):
    """The mask as a set of (query, key) pairs, from its definition."""
    return {
        (q, k)
        for start, stop in mask.documents
        for q in range(start, stop)
        for k in range(start, stop)
        if k <= q or not mask.causal
    }


def pairs(slices, queries, keys):
    """The (query, key) pairs that slices cover, as positions, each as often as it is covered."""
    found = []
    for s in slices:
        for i, q in enumerate(range(s.q_start, s.q_stop)):
            stop = s.k_stop if s.rule == 0 else s.k_start + i + 1
            found += [(queries[q], keys[k]) for k in range(s.k_start, stop)]
    return found


def positions(ranges):
    """The rows of ranges, one by one."""
    return [row for start, stop in ranges for row in range(start, stop)]
