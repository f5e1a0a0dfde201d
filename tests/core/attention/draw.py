"""Random rows for property tests: documents with and without padding, and how they are shared out."""

from hypothesis import settings, strategies as st

from zoo.core.contracts.attention import SliceRule
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

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
    kind = draw(st.sampled_from(["causal", "causal", "window", "window", "prefix", "full"]))
    if kind == "window":
        return Mask(length, documents, window=draw(st.integers(1, length + 2)))
    if kind == "prefix" and documents:
        return Mask(length, documents, prefixes=tuple(draw(st.integers(0, b - a)) for a, b in documents))
    return Mask(length, documents, causal=kind != "full")


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
    prefixes = mask.prefixes or [0] * len(mask.documents)
    return {
        (q, k)
        for (start, stop), prefix in zip(mask.documents, prefixes)
        for q in range(start, stop)
        for k in range(start, stop)
        if not mask.causal or k < start + prefix or (k <= q and (mask.window is None or q - mask.window < k))
    }


def pairs(slices, queries, keys):
    """The (query, key) pairs that slices cover, as positions, each as often as it is covered."""
    found = []
    for s in slices:
        for i, q in enumerate(range(s.q_start, s.q_stop)):
            start = s.k_start + i if s.rule is SliceRule.ANTICAUSAL else s.k_start
            stop = s.k_start + i + 1 if s.rule is SliceRule.CAUSAL else s.k_stop
            found += [(queries[q], keys[k]) for k in range(start, stop)]
    return found


def positions(ranges):
    """The rows of ranges, one by one."""
    return [row for start, stop in ranges for row in range(start, stop)]
