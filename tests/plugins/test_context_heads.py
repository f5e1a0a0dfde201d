"""Heads are dealt out once each, evenly; key/value heads are replicated only when there are fewer than ranks."""

import re

import pytest
from hypothesis import given, strategies as st

from tests.core.attention.draw import patient
from zoo.core.contracts.attention import AttentionProblem, HeadShape
from zoo.plugins.context.heads import share_heads, sharing_problem
from zoo.plugins.context.hybrid import Hybrid, best_group
from zoo.plugins.context.ulysses import Ulysses


def _heads(num_heads, num_kv_heads):
    return HeadShape(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8)


shapes = st.builds(lambda groups, repeats: _heads(groups * repeats, groups), st.integers(1, 12), st.integers(1, 9))


@st.composite
def dealings(draw):
    """Heads, and a degree at which every rank gets one."""
    heads = draw(shapes)
    return heads, draw(st.sampled_from([n for n in range(1, 65) if sharing_problem(heads, n) is None]))


@patient
@given(dealings())
def test_every_query_head_is_dealt_once_in_order(dealing):
    heads, degree = dealing
    shares = share_heads(heads, degree)
    assert len(shares) == degree
    assert [head for share in shares for head in range(*share.query)] == list(range(heads.num_heads))
    assert all(share.shape[0] > 0 for share in shares)


@patient
@given(dealings())
def test_query_heads_find_their_key_value_heads_where_they_are(dealing):
    """In its share as in the whole, query head n reads key/value head n // (N // G)."""
    heads, degree = dealing
    repeats = heads.num_heads // heads.num_kv_heads
    for share in share_heads(heads, degree):
        mine, keys = share.shape
        assert mine % keys == 0
        for number, head in enumerate(range(*share.query)):
            assert share.key_value[0] + number // (mine // keys) == head // repeats


@patient
@given(dealings())
def test_key_value_heads_are_replicated_only_when_there_are_fewer_than_ranks(dealing):
    heads, degree = dealing
    held = [head for share in share_heads(heads, degree) for head in range(*share.key_value)]
    assert sorted(set(held)) == list(range(heads.num_kv_heads))
    assert len(held) == max(heads.num_kv_heads, degree)


@patient
@given(dealings())
def test_shares_are_as_even_as_whole_key_value_heads_allow(dealing):
    """Each rank has floor or ceil of G/P key/value heads; or one, which floor or ceil of P/G ranks read."""
    heads, degree = dealing
    kv_heads, repeats = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads
    queries, keys = zip(*(share.shape for share in share_heads(heads, degree)))
    assert max(keys) - min(keys) <= 1
    if kv_heads >= degree:
        assert max(queries) == repeats * -(-kv_heads // degree)
    else:
        assert max(queries) <= -(-repeats // (degree // kv_heads))
        assert min(queries) >= repeats // -(-degree // kv_heads)


@pytest.mark.parametrize(
    ("shape", "degree", "queries", "keys"),
    [
        ((32, 8), 8, [4] * 8, [1] * 8),
        ((32, 8), 4, [8] * 4, [2] * 4),
        ((32, 8), 16, [2] * 16, [1] * 16),
        ((32, 8), 5, [4, 8, 4, 8, 8], [1, 2, 1, 2, 2]),
        ((6, 2), 4, [1, 2, 1, 2], [1] * 4),
        ((6, 1), 4, [1, 2, 1, 2], [1] * 4),
        ((3, 3), 2, [1, 2], [1, 2]),
    ],
)
def test_uneven_heads(shape, degree, queries, keys):
    shares = share_heads(_heads(*shape), degree)
    assert [share.shape for share in shares] == list(zip(queries, keys))


@patient
@given(shapes, st.integers(1, 128))
def test_a_refusal_names_the_largest_degree_that_works(heads, degree):
    reason = sharing_problem(heads, degree)
    if reason is None:
        return
    given, most, wanted = re.fullmatch(r"(.*) can be dealt out to at most (\d+) ranks, not to (\d+)", reason).groups()
    assert given == f"{heads.num_heads} query heads over {heads.num_kv_heads} key/value heads"
    assert int(wanted) == degree
    assert sharing_problem(heads, int(most)) is None
    assert all(sharing_problem(heads, n) is not None for n in range(int(most) + 1, degree + 1))


@patient
@given(shapes)
def test_as_many_ranks_as_query_heads_can_always_be_served(heads):
    assert sharing_problem(heads, heads.num_heads) is None
    assert sharing_problem(heads, heads.num_heads + 1) is not None


@patient
@given(shapes, st.integers(1, 64))
def test_the_best_group_divides_the_ranks_and_has_heads_for_all(heads, degree):
    group = best_group(heads, degree)
    assert degree % group == 0
    assert sharing_problem(heads, group) is None
    if any(degree % n == 0 and sharing_problem(heads, n) is None for n in range(2, degree)):
        assert 1 < group < degree


@pytest.mark.parametrize(
    ("shape", "degree", "group"), [((32, 8), 8, 4), ((32, 8), 64, 8), ((64, 8), 64, 8), ((4, 1), 9, 3), ((4, 4), 3, 3)]
)
def test_the_best_group_sends_least(shape, degree, group):
    """2 (N + G') (U-1)/U shares of a row for heads, 2 (R-1) G' for the ring; worked out by hand for these."""
    assert best_group(_heads(*shape), degree) == group


def _problem(num_heads, num_kv_heads):
    return AttentionProblem(device="cpu", dtype="float32", head_dim=8, num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("scheme", "degree", "words"),
    [
        (Ulysses(), 32, None),
        (Ulysses(), 33, ["32 query heads over 8", "at most 32 ranks, not to 33", "--cp-scheme hybrid"]),
        (Hybrid(), 1000, None),
        (Hybrid("4"), 8, None),
        (Hybrid("3"), 8, ["groups of 8 ranks have 1, 2, 4 or 8, not 3"]),
        (Hybrid("0"), 8, ["1, 2, 4 or 8, not 0"]),
        (Hybrid(64), 64, ["at most 32 ranks, not to 64", "smaller group", "--cp-scheme ring"]),
    ],
    ids=lambda part: getattr(part, "name", None),
)
def test_schemes_that_deal_heads_out_say_what_they_cannot(scheme, degree, words):
    reason = scheme.check(_problem(32, 8), 4096, degree)
    assert (reason is None) if words is None else all(word in reason for word in words), reason
