"""The plans of the context schemes, without processes: minimal work, balance, traffic within the formulas."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.attention.draw import layouts, masks, pairs, patient, positions, visible
from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask
from zoo.core.attention.needs import remote_needs
from zoo.core.attention.ranges import count, union
from zoo.plugins.context import allgather_plugin, ring_plugin
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ring_plan import Route

DEGREES = (2, 3, 4, 8)
SCHEMES = (Ring(), Allgather())


def _plans(scheme, mask, layout):
    return [scheme.plan(mask, layout, rank) for rank in range(layout.degree)]


def _needed(mask, layout):
    """(reader, key) pairs over ranks, from the definition of the mask."""
    owner = {row: rank for rank, chunks in enumerate(layout.chunks) for row in positions(chunks)}
    return owner, {(owner[q], k) for q, k in visible(mask) if owner[q] != owner[k]}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@patient
@given(st.data(), masks(max_length=60))
def test_every_visible_pair_is_computed_once_and_nothing_else(scheme, data, mask):
    layout = data.draw(layouts(mask.length))
    assert sum(s.area for plan in _plans(scheme, mask, layout) for s in plan.slices) == mask.area


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


@patient
@given(st.data(), masks(max_length=60))
def test_allgather_sends_each_visible_row_once_to_each_reader(data, mask):
    layout = data.draw(layouts(mask.length))
    plans = _plans(Allgather(), mask, layout)
    needed = _needed(mask, layout)[1]
    assert sum(plan.sent_rows for plan in plans) == len(needed)
    for rank, plan in enumerate(plans):
        assert plan.keys == len([k for r, k in needed if r == rank]) == plan.sent_gradient_rows


@pytest.mark.parametrize("degree", DEGREES)
def test_causal_head_tail_sends_three_quarters_and_is_balanced(degree):
    layout = Ring().layout(48 * degree, degree)
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
    assert sum(plan.sent_rows for plan in _plans(Allgather(), mask, layout)) == 0.75 * degree * (degree - 1) * rows


@pytest.mark.parametrize("degree", DEGREES)
def test_causal_contiguous_sends_half(degree):
    layout, mask = SequenceLayout.contiguous(48 * degree, degree), Mask.whole(48 * degree)
    plans = _plans(Ring(), mask, layout)
    assert sum(plan.forward.sent_rows for plan in plans) == 0.5 * degree * (degree - 1) * 48
    assert sum(plan.backward.sent_gradient_rows for plan in plans) == 0.5 * degree * (degree - 1) * 48


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("degree", DEGREES)
def test_documents_that_stay_inside_chunks_send_nothing(scheme, degree):
    mask = Mask(16 * degree, tuple((at, at + 4) for at in range(0, 16 * degree, 4)))
    for plan in _plans(scheme, mask, scheme.layout(16 * degree, degree)):
        if isinstance(scheme, Ring):
            assert plan.forward.sent_rows == plan.backward.sent_gradient_rows == 0
            assert not any(hop.sends or hop.receives for hop in plan.forward.hops)
        else:
            assert plan.sent_rows == 0


@patient
@given(st.data(), masks(max_length=60))
def test_traffic_of_a_rank_never_exceeds_the_formula(data, mask):
    layout = data.draw(layouts(mask.length, degrees=DEGREES))
    largest = max(layout.local_length(rank) for rank in range(layout.degree))
    for plan in _plans(Ring(), mask, layout):
        assert plan.forward.sent_rows <= (layout.degree - 1) * largest
        assert plan.backward.sent_gradient_rows <= (layout.degree - 1) * largest


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_one_rank_sends_nothing(scheme):
    plan = scheme.plan(Mask.whole(10), scheme.layout(10, 1), 0)
    assert len(plan.slices) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize(("degree", "milliseconds"), [(8, 30), (64, 150)])
def test_a_plan_is_quick(scheme, degree, milliseconds):
    length = 1 << 16
    cuts = sorted(random.Random(0).sample(range(1, length), 299))
    mask, layout = Mask(length, tuple(zip([0, *cuts], [*cuts, length]))), scheme.layout(length, degree)
    best = min(_seconds(lambda: scheme.plan(mask, layout, 3)) for _ in range(5))
    assert best * 1000 < milliseconds


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_lengths_are_checked_with_the_nearest_that_work():
    for scheme in SCHEMES:
        assert scheme.check(None, 1024, 8) is None
        assert "nearest: --seq 994 or --seq 1008" in scheme.check(None, 1000, 7)


def test_the_ring_is_chosen_where_it_can():
    assert ring_plugin.zoo_select_context_scheme(None, ["allgather", "ring"]) == "ring"
    assert ring_plugin.zoo_select_context_scheme(None, ["allgather"]) is None
    entries = [*ring_plugin.zoo_register_context_schemes(), *allgather_plugin.zoo_register_context_schemes()]
    assert [entry.load()().name for entry in entries] == [entry.name for entry in entries]


def test_needs_union_is_what_the_ring_packs():
    layout = Ring().layout(64, 4)
    mask = Mask(64, ((0, 20), (20, 64)))
    for rank, plan in enumerate(_plans(Ring(), mask, layout)):
        rows = union(need.rows for need in remote_needs(mask, layout) if need.owner == rank)
        local = positions(layout.chunks[rank])
        for way in (plan.forward, plan.backward):
            assert [local[row] for row in positions(way.packed)] == positions(rows)
            assert way.home == way.packed
