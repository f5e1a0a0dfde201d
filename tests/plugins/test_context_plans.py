"""The plans of the context schemes, without processes: minimal work, balance, traffic within the formulas."""

import random

import pytest
from hypothesis import given, strategies as st

from tests.core.attention.draw import layouts, masks, pairs, patient, positions, visible
from tests.harness.work import lines_run
from zoo.core.attention.needs import remote_needs
from zoo.core.attention.wire import rows_in
from zoo.core.contracts.attention import Forecast, HeadShape
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import count, union
from zoo.plugins.context import (
    allgather_plugin,
    choice_plugin,
    halo_plugin,
    hybrid_plugin,
    ring_plugin,
    ulysses_plugin,
)
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.halo import Halo
from zoo.plugins.context.hybrid import Hybrid
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ring_plan import Route
from zoo.plugins.context.ulysses import Ulysses

DEGREES = (2, 3, 4, 8)
FETCHING, DEALING = (Allgather(), Halo()), (Ulysses(), Hybrid())
MOVING_KEYS = (Ring(), *FETCHING)
SCHEMES = (*MOVING_KEYS, *DEALING)
HEADS = HeadShape(num_heads=8, num_kv_heads=2, head_dim=4)
ROW = 2 * HEADS.num_kv_heads * HEADS.head_dim
"""Numbers in a row of K and V."""


def _plans(scheme, mask, layout, heads=HEADS):
    return [scheme.plan(mask, layout, rank, heads) for rank in range(layout.degree)]


def _named(schemes):
    return pytest.mark.parametrize("scheme", schemes, ids=lambda scheme: scheme.name)


def _needed(mask, layout):
    """(reader, key) pairs over ranks, from the definition of the mask."""
    owner = {row: rank for rank, chunks in enumerate(layout.chunks) for row in positions(chunks)}
    return owner, {(owner[q], k) for q, k in visible(mask) if owner[q] != owner[k]}


@_named(SCHEMES)
@patient
@given(st.data(), masks(max_length=60))
def test_every_visible_pair_is_computed_once_for_every_head_and_nothing_else(scheme, data, mask):
    layout = data.draw(layouts(mask.length))
    ways = [plan.stages(2, 4) for plan in _plans(scheme, mask, layout)]
    for way in (0, 1):
        assert sum(stage.scores for stages in ways for stage in stages[way]) == mask.area * HEADS.num_heads


@patient
@given(st.data(), masks(max_length=60))
def test_ring_messages_match_and_bring_every_key_to_every_query_that_sees_it(data, mask):
    """Follows the messages of both passes by the positions they carry, then compares what is computed."""
    layout = data.draw(layouts(mask.length))
    plans = _plans(Ring(), mask, layout)
    for name in ("forward", "backward"):
        covered = []
        for buffers in _travel([getattr(plan, name) for plan in plans], layout):
            for rank, step, rows in buffers:
                queries = positions(layout.chunks[rank])[slice(*step.queries)]
                covered += pairs(step.slices, queries, rows[slice(*step.keys)])
        for rank, plan in enumerate(plans):
            local = positions(layout.chunks[rank])
            covered += pairs(plan.own, local, local)
        assert sorted(covered) == sorted(visible(mask))


def _travel(passes, layout):
    """The positions in each rank's K/V buffer after each hop, moved by the messages alone."""
    local = [positions(chunks) for chunks in layout.chunks]
    buffers = [[local[rank][row] for row in positions(way.packed)] for rank, way in enumerate(passes)]
    for number in range(layout.degree - 1):
        arrived = [[None] * way.rows[number] for way in passes]
        mail = {}
        for rank, way in enumerate(passes):
            for message in way.hops[number].sends:
                mail.setdefault((rank, message.peer), []).append(buffers[rank][slice(*message.rows)])
        for rank, way in enumerate(passes):
            for message in way.hops[number].receives:
                arrived[rank][slice(*message.rows)] = mail[message.peer, rank].pop(0)
        assert not any(mail.values())
        assert all(None not in rows for rows in arrived)
        buffers = arrived
        yield [(rank, way.steps[number], buffers[rank]) for rank, way in enumerate(passes)]


@patient
@given(st.data(), masks(max_length=60))
def test_ring_keeps_a_row_only_while_somebody_further_on_needs_it(data, mask):
    layout = data.draw(layouts(mask.length))
    owner, needed = _needed(mask, layout)
    degree = layout.degree
    for direction in (1, -1):
        route = Route(remote_needs(mask, layout), degree, direction)
        for o in range(degree):
            for hop in range(1, degree):
                ahead = {(o + direction * h) % degree for h in range(hop, degree)}
                behind = {(o + direction * h) % degree for h in range(1, hop + 1)}
                rows = sorted({k for r, k in needed if owner[k] == o and r in ahead})
                assert positions(route.wanted(o, hop)) == rows
                rows = sorted({k for r, k in needed if owner[k] == o and r in behind})
                assert positions(route.touched(o, hop)) == rows
        volume = sum(count(route.wanted(o, h)) for o in range(degree) for h in range(1, degree))
        gradients = sum(count(route.touched(o, h)) for o in range(degree) for h in range(1, degree))
        assert route.volume(gradient_weight=3) == volume + 3 * gradients


@patient
@given(st.data(), masks(max_length=60))
def test_the_ring_takes_the_direction_that_sends_less(data, mask):
    layout = data.draw(layouts(mask.length))
    plans = _plans(Ring(), mask, layout)
    routes = {d: Route(remote_needs(mask, layout), layout.degree, d) for d in (1, -1)}
    for name, weight in (("forward", 0), ("backward", 2)):
        directions = {getattr(plan, name).direction for plan in plans}
        assert len(directions) == 1
        volumes = {d: route.volume(gradient_weight=weight) for d, route in routes.items()}
        assert volumes[directions.pop()] == min(volumes.values())
    assert sum(plan.forward.sent_rows for plan in plans) == min(r.volume(gradient_weight=0) for r in routes.values())


@_named(FETCHING)
@patient
@given(st.data(), masks(max_length=60))
def test_what_is_fetched_is_each_visible_row_once_for_each_reader(scheme, data, mask):
    layout = data.draw(layouts(mask.length))
    plans = _plans(scheme, mask, layout)
    needed = _needed(mask, layout)[1]
    assert sum(plan.sent_rows for plan in plans) == len(needed)
    for rank, plan in enumerate(plans):
        assert plan.keys == len([k for r, k in needed if r == rank]) == plan.sent_gradient_rows


@_named(FETCHING)
@patient
@given(st.data(), masks(max_length=60))
def test_fetched_messages_match_and_bring_every_key_to_every_query_that_sees_it(scheme, data, mask):
    layout = data.draw(layouts(mask.length))
    plans, local = _plans(scheme, mask, layout), [positions(chunks) for chunks in layout.chunks]
    covered, mail = [], {}
    for rank, plan in enumerate(plans):
        packed = [local[rank][row] for row in positions(plan.packed)]
        for message, home in zip(plan.sends, plan.home):
            rows = packed[slice(*message.rows)]
            assert rows == local[rank][slice(*home)]  # their gradients come back to where they came from
            mail.setdefault((rank, message.peer), []).append(rows)
        assert [m.peer for m in plan.returned] == [m.peer for m in plan.sends]
    for rank, plan in enumerate(plans):
        keys = [None] * plan.keys
        for message in plan.receives:
            keys[slice(*message.rows)] = mail[message.peer, rank].pop(0)
        assert keys == sorted(set(keys))  # in order of position, no row twice, no gap
        queries = local[rank][slice(*plan.step.queries)]
        covered += pairs(plan.own, local[rank], local[rank])
        covered += pairs(plan.step.slices, queries, keys[slice(*plan.step.keys)])
    assert not any(mail.values())
    assert sorted(covered) == sorted(visible(mask))


@_named([*DEALING, *(Hybrid(n) for n in (1, 2, 4))])
@patient
@given(st.data(), masks(max_length=60))
def test_dealt_heads_see_every_row_of_their_group_once(scheme, data, mask):
    layout = data.draw(layouts(mask.length, degrees=(4, 8)))
    for rank, plan in enumerate(_plans(scheme, mask, layout)):
        inner = scheme.inner(HEADS, layout.degree)
        assert rank in plan.peers
        assert plan.peers[plan.me] == rank
        assert plan.peers == tuple(range(rank - rank % inner, rank - rank % inner + inner))
        whole = [None] * plan.rows
        for peer, places in zip(plan.peers, plan.places):
            for chunk, place in zip(layout.chunks[peer], places, strict=True):
                whole[slice(*place)] = range(*chunk)
        assert whole == sorted(row for peer in plan.peers for row in positions(layout.chunks[peer]))
        assert plan.local == layout.local_length(rank)
        ahead = [hop for way in (plan.ring.forward, plan.ring.backward) for hop in way.hops]
        peers = {message.peer for hop in ahead for message in (*hop.sends, *hop.receives)}
        assert all((peer - rank) % inner == 0 and peer not in plan.peers for peer in peers)


@_named(SCHEMES)
@patient
@given(st.data(), masks(max_length=60))
def test_stages_say_what_the_messages_carry(scheme, data, mask):
    """Bytes of all stages are the rows of all messages; keys in their type, sums of gradients in theirs."""
    layout = data.draw(layouts(mask.length))
    for plan in _plans(scheme, mask, layout):
        ahead, back = (sum(stage.sent for stage in way) for way in plan.stages(2, 4))
        keys, keys_again, sums, dealt_ahead, dealt_back = _rows_sent(plan)
        assert ahead == 2 * (keys + dealt_ahead)
        assert back == 2 * keys_again + 4 * sums + dealt_back
        assert all(stage.sent >= 0 and stage.scores >= 0 for way in plan.stages(2, 4) for stage in way)


def _rows_sent(plan):
    """Numbers in messages: keys forward, keys backward, sums backward; heads dealt out (backward in bytes)."""
    if hasattr(plan, "groups"):
        rows = ROW * rows_in(plan.sends)
        return rows, rows, ROW * rows_in(plan.receives), 0, 0
    ring = plan.ring if hasattr(plan, "ring") else plan
    row = 2 * ring.heads.num_kv_heads * ring.heads.head_dim
    keys, again = (row * sum(rows_in(hop.sends) for hop in way.hops) for way in (ring.forward, ring.backward))
    sums = row * sum(rows_in(hop.sends) for hop in ring.backward.gradient_hops)
    return keys, again, sums, *(_dealt(plan) if hasattr(plan, "ring") else (0, 0))


def _dealt(plan):
    """Numbers sent to deal heads out and back: q, k, v and out; bytes for dout, and dq, dk, dv."""
    size, mine = HEADS.head_dim, plan.shares[plan.me]
    others = [share for number, share in enumerate(plan.shares) if number != plan.me]
    theirs = [size * plan.local * sum(share.shape[i] for share in others) for i in (0, 1)]
    back = size * (plan.rows - plan.local)
    sums = 4 if len(plan.shares) > HEADS.num_kv_heads else 2
    ahead = theirs[0] + 2 * theirs[1] + back * mine.shape[0]
    return ahead, 2 * theirs[0] + back * (2 * mine.shape[0] + sums * 2 * mine.shape[1])


@patient
@given(st.data(), masks(max_length=60))
def test_stages_of_the_ring_are_its_steps(data, mask):
    """While step i is computed the keys of step i + 1 travel, and backward the gradients of step i - 1."""
    layout = data.draw(layouts(mask.length, degrees=(2, 3, 4)))
    for plan in _plans(Ring(), mask, layout):
        ahead, back = plan.stages(2, 4)
        areas = [HEADS.num_heads * sum(s.area for s in plan.own)]
        assert [stage.scores for stage in ahead] == areas + [8 * step.area for step in plan.forward.steps]
        assert [stage.sent for stage in ahead] == [2 * ROW * rows_in(hop.sends) for hop in plan.forward.hops] + [0]
        hops = len(plan.backward.hops)
        keys = [2 * ROW * rows_in(hop.sends) for hop in plan.backward.hops] + [0, 0]
        sums = [0, 0] + [4 * ROW * rows_in(hop.sends) for hop in plan.backward.gradient_hops]
        assert [stage.sent for stage in back] == [key + total for key, total in zip(keys, sums, strict=True)]
        assert [stage.scores for stage in back][hops + 1 :] == [0]  # the last gradients come home, nothing hides them


@pytest.mark.parametrize("degree", DEGREES)
def test_causal_head_tail_sends_three_quarters_and_is_balanced(degree):
    layout = SequenceLayout.head_tail(48 * degree, degree)
    mask, rows = Mask.whole(48 * degree), 48
    plans = _plans(Ring(), mask, layout)
    sent = [plan.forward.sent_rows for plan in plans]
    assert sum(sent) == 0.75 * degree * (degree - 1) * rows
    assert max(sent) <= (degree - 1) * rows
    areas = [sum(s.area for s in plan.slices) for plan in plans]
    assert max(areas) * degree == sum(areas) == mask.area
    # Nothing a rank computes per step is cut into more than one rectangle, or it would cost kernel launches.
    assert max(len(step.slices) for plan in plans for step in plan.forward.steps) == 1
    assert sum(plan.backward.sent_gradient_rows for plan in plans) == 0.75 * degree * (degree - 1) * rows
    for scheme in FETCHING:
        assert sum(plan.sent_rows for plan in _plans(scheme, mask, layout)) == 0.75 * degree * (degree - 1) * rows


@pytest.mark.parametrize("degree", DEGREES)
def test_causal_contiguous_sends_half(degree):
    layout, mask = SequenceLayout.contiguous(48 * degree, degree), Mask.whole(48 * degree)
    plans = _plans(Ring(), mask, layout)
    assert sum(plan.forward.sent_rows for plan in plans) == 0.5 * degree * (degree - 1) * 48
    assert sum(plan.backward.sent_gradient_rows for plan in plans) == 0.5 * degree * (degree - 1) * 48


@_named(MOVING_KEYS)
@pytest.mark.parametrize("degree", DEGREES)
def test_documents_that_stay_inside_chunks_send_nothing(scheme, degree):
    mask = Mask(16 * degree, tuple((at, at + 4) for at in range(0, 16 * degree, 4)))
    for plan in _plans(scheme, mask, SequenceLayout.head_tail(16 * degree, degree)):
        assert not any(stage.sent for way in plan.stages(2, 4) for stage in way)
        if isinstance(scheme, Ring):
            assert not any(hop.sends or hop.receives for hop in (*plan.forward.hops, *plan.backward.gradient_hops))
        else:
            assert (plan.sends, plan.receives) == ((), ())


@pytest.mark.parametrize("degree", DEGREES)
def test_documents_inside_a_group_send_nothing_round_the_ring(degree):
    """Dealing heads out costs the same whatever the mask; what crosses groups is what the ring sends."""
    mask = Mask(16 * degree, tuple((at, at + 4) for at in range(0, 16 * degree, 4)))
    for scheme in DEALING:
        for plan in _plans(scheme, mask, SequenceLayout.head_tail(16 * degree, degree)):
            assert plan.ring.forward.sent_rows == plan.ring.backward.sent_gradient_rows == 0


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("window", [1, 2, 9, 24])
def test_a_window_shows_a_rank_no_more_than_it_reaches_before_each_chunk(degree, window):
    mask = Mask.whole(48 * degree, window=window)
    for scheme in FETCHING:
        contiguous = _plans(scheme, mask, SequenceLayout.contiguous(48 * degree, degree))
        assert [plan.keys for plan in contiguous] == [0] + [window - 1] * (degree - 1)
        for plan in _plans(scheme, mask, SequenceLayout.head_tail(48 * degree, degree)):
            assert plan.keys <= 2 * (window - 1)


@patient
@given(st.data(), masks(max_length=60))
def test_traffic_of_a_rank_never_exceeds_the_formula(data, mask):
    layout = data.draw(layouts(mask.length, degrees=DEGREES))
    largest = max(layout.local_length(rank) for rank in range(layout.degree))
    for plan in _plans(Ring(), mask, layout):
        assert plan.forward.sent_rows <= (layout.degree - 1) * largest
        assert plan.backward.sent_gradient_rows <= (layout.degree - 1) * largest


@_named(SCHEMES)
def test_one_rank_sends_nothing(scheme):
    plan = scheme.plan(Mask.whole(10), SequenceLayout.head_tail(10, 1), 0, HEADS)
    assert len(plan.slices) == 1
    assert not any(stage.sent for way in plan.stages(2, 4) for stage in way)


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize(("degree", "most"), [(8, 40_000), (64, 200_000)])
@_named(SCHEMES)
def test_a_plan_is_quick(scheme, degree, most, window):
    """In lines of Python: about 60 and 300 ms on a processor of 2024."""
    length, heads = 1 << 16, HeadShape(num_heads=64, num_kv_heads=8, head_dim=128)
    cuts = sorted(random.Random(0).sample(range(1, length), 299))
    mask = Mask(length, tuple(zip([0, *cuts], [*cuts, length])), window=window)
    layout = SequenceLayout.head_tail(length, degree)
    assert lines_run(lambda: scheme.plan(mask, layout, 3, heads)) < most


def test_schemes_that_deal_no_heads_out_have_no_limits():
    for scheme in (Ring(), Allgather(), Halo(), Hybrid()):
        assert [scheme.check(None, length, degree) for length, degree in ((1000, 7), (1024, 8), (9, 64))] == [None] * 3


def test_every_entry_loads_and_is_called_what_it_says():
    plugins = (ring_plugin, allgather_plugin, ulysses_plugin, hybrid_plugin, halo_plugin)
    entries = [entry for plugin in plugins for entry in plugin.zoo_register_context_schemes()]
    assert [entry.name for entry in entries] == ["ring", "allgather", "ulysses", "hybrid", "halo"]
    assert [entry.load()().name for entry in entries] == [entry.name for entry in entries]


@pytest.mark.parametrize(
    ("window", "seconds", "chosen"),
    [
        (None, {"ulysses": 1.0, "ring": 1.005, "allgather": 1.5}, "ring"),
        (None, {"ulysses": 1.0, "ring": 1.2, "allgather": 1.005}, "allgather"),
        (None, {"halo": 1.0, "ulysses": 1.0}, "ulysses"),
        (512, {"halo": 1.0, "ring": 1.0, "ulysses": 1.0}, "halo"),
        (512, {"halo": 1.2, "ring": 1.0}, "ring"),
        (None, {"ring": 2.0, "mine": 1.0}, "mine"),
    ],
)
def test_the_choice_is_the_fastest_and_between_equals_the_smallest(window, seconds, chosen):
    costs = {
        name: Forecast(sent=(1, 1), hidden=1.0, seconds=each, compute_seconds=0.5) for name, each in seconds.items()
    }
    assert choice_plugin.zoo_select_context_scheme(None, window, costs) == chosen


def test_needs_union_is_what_the_ring_packs():
    layout = SequenceLayout.head_tail(64, 4)
    mask = Mask(64, ((0, 20), (20, 64)))
    for rank, plan in enumerate(_plans(Ring(), mask, layout)):
        rows = union(need.rows for need in remote_needs(mask, layout) if need.owner == rank)
        local = positions(layout.chunks[rank])
        for way in (plan.forward, plan.backward):
            assert [local[row] for row in positions(way.packed)] == positions(rows)
            assert way.home == way.packed
