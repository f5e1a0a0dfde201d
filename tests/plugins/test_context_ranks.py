"""The context schemes on real gloo ranks: results equal the formula, work and traffic equal the plan."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.attention.draw import layouts, masks
from tests.core.attention.test_kernel import Formula
from tests.distributed import ranks
from zoo.core.attention import wire
from zoo.core.attention.layout import SequenceLayout
from zoo.core.attention.mask import Mask
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.ring import Ring
from zoo.testing.attention import Example, reference

pytestmark = pytest.mark.dist

WORLDS = (1, 2, 3, 4, 8)
LENGTH = 96
SHAPE = (2, 4, 2, 8)
MASKS = {
    "whole": Mask.whole(LENGTH),
    "one spans all ranks, padding at both ends": Mask(LENGTH, ((14, 83),)),
    "packed": Mask(LENGTH, ((0, 5), (5, 31), (31, 32), (40, 77), (77, 96))),
    "tiny": Mask(LENGTH, tuple((at, at + 2) for at in range(1, 95, 2))),
    "ranks with only padding": Mask(LENGTH, ((40, 56),)),
    "only padding": Mask(LENGTH, ()),
    "not causal": Mask(LENGTH, ((3, 50), (50, 96)), causal=False),
}
LAYOUTS = {"head_tail": SequenceLayout.head_tail, "contiguous": SequenceLayout.contiguous, "dealt": None}


def _layout(kind, degree):
    if kind != "dealt":
        return LAYOUTS[kind](LENGTH, degree)
    parts = [(at, at + 8) for at in range(0, LENGTH, 8)]
    return SequenceLayout(LENGTH, tuple(tuple(parts[(rank * 5) % degree :: degree]) for rank in range(degree)))


class Spy:
    """Counts what goes through torch's point-to-point calls and what the backend computes."""

    def __init__(self, group):
        self.group, self.events, self.bytes = group, [], 0
        self.buffers = {}

    def __enter__(self):
        self._inner = dist.batch_isend_irecv
        dist.batch_isend_irecv = self._post
        return self

    def __exit__(self, *_):
        dist.batch_isend_irecv = self._inner

    def _post(self, operations):
        self.events.append("post")
        for op in operations:
            self.buffers.setdefault(op.tag, set()).add(op.tensor.untyped_storage().data_ptr())
            assert op.group is self.group
            assert op.tensor.is_contiguous()
            if op.op is dist.isend:
                self.bytes += op.tensor.numel() * op.tensor.element_size()
        return [_Work(self.events, self._inner(operations))]


class _Work:
    """Works of one post, which log when they are waited for."""

    def __init__(self, events, works):
        self.events, self.works = events, works

    def wait(self):
        self.events.append("wait")
        for work in self.works:
            work.wait()


class Logged(Formula):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def forward(self, *arguments):
        self.events.append("compute")
        return super().forward(*arguments)

    def backward(self, *arguments):
        self.events.append("compute")
        return super().backward(*arguments)


def _attention(scheme_class, mask, kind, dtype=torch.float64, group=None):
    """Attention of this rank under a named layout of the usual length and shape; as `_share`."""
    group = group or dist.group.WORLD
    return _share(scheme_class, mask, _layout(kind, dist.get_world_size(group)), SHAPE, dtype, group)


def _share(scheme_class, mask, layout, shape, dtype, group):
    """out, dq, dk, dv of this rank, what the spies saw forward and backward, bytes and area by the plan."""
    rank, scheme = dist.get_rank(group), scheme_class()
    x = Example.random(shape, mask.length, dtype=dtype, device="cpu")
    q, k, v, dout = (layout.take(t, rank, 2).detach().clone() for t in (x.q, x.k, x.v, x.dout))
    for t in (q, k, v):
        t.requires_grad_()
    sharded, reports = ShardedMask(mask, layout, rank), []
    plan = sharded.plan(scheme)
    with Spy(group) as spy:
        backend = Logged(spy.events)
        out = AttentionSeam(backend, Exchange(scheme=scheme, group=group))(q, k, v, sharded)
        reports.append(_report(spy, backend))
    with Spy(group) as spy:
        backend.events = spy.events
        backend.area = 0
        grads = torch.autograd.grad(out, (q, k, v), dout)
        reports.append(_report(spy, backend))
    return [t.detach() for t in (out, *grads)], reports, _planned(plan, k), sum(s.area for s in plan.slices)


def _report(spy, backend):
    return {
        "area": backend.area,
        "bytes": spy.bytes,
        "events": spy.events,
        "buffers": {tag: len(found) for tag, found in spy.buffers.items()},
    }


def _planned(plan, k):
    """Bytes a rank sends forward and backward, by its plan."""
    row, gradient_row = wire.row_bytes(k), wire.row_bytes(k, torch.promote_types(k.dtype, torch.float32))
    ahead, back = getattr(plan, "forward", plan), getattr(plan, "backward", plan)
    return ahead.sent_rows * row, back.sent_rows * row + back.sent_gradient_rows * gradient_row


def _all_cases(scheme_class, kind):
    return {name: _attention(scheme_class, mask, kind) for name, mask in MASKS.items()}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("scheme", [Ring, Allgather])
@pytest.mark.parametrize("world", WORLDS)
def test_results_equal_the_formula_and_counters_the_plan(world, scheme, kind):
    answers = ranks.run(world, _all_cases, scheme, kind)
    layout = _layout(kind, world)
    x = Example.random(SHAPE, LENGTH, dtype=torch.float64, device="cpu")
    for name, mask in MASKS.items():
        parts = [answer[name] for answer in answers]
        joined = [layout.join([part[0][i] for part in parts], 2) for i in range(4)]
        for got, wanted in zip(joined, reference(x, mask)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert sum(part[1][0]["area"] for part in parts) == mask.area
        assert sum(part[1][1]["area"] for part in parts) == mask.area
        for _, (ahead, back), (planned_ahead, planned_back), area in parts:
            assert (ahead["bytes"], back["bytes"]) == (planned_ahead, planned_back)
            assert (ahead["area"], back["area"]) == (area, area)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_ring_meets_its_formulas_on_the_wire(world):
    parts = ranks.run(world, _attention, Ring, MASKS["whole"], "head_tail")
    batch, _, groups, size = SHAPE
    kv = 2 * (LENGTH // world) * batch * groups * size * 8
    sent = [part[1][0]["bytes"] for part in parts]
    assert max(sent) <= (world - 1) * kv
    assert sum(sent) == 0.75 * world * (world - 1) * kv
    areas = [part[1][0]["area"] for part in parts]
    assert max(areas) * world == sum(areas)
    for _, (ahead, back), _, _ in parts:
        assert ahead["buffers"] == {0: min(2, world)}
        assert back["buffers"] == {0: 2, 1: 2}


def test_the_next_step_travels_while_this_one_is_computed():
    step = "post compute wait "
    for part in ranks.run(4, _attention, Ring, MASKS["not causal"], "head_tail"):
        ahead, back = (" ".join(way["events"]) for way in part[1])
        assert ahead == 3 * step + "compute"
        # Own keys; three steps, of which the first two send their gradients on while the next one is computed; home.
        assert back == step + "post compute post wait " + "post compute wait post wait " + "compute wait post wait"
    for part in ranks.run(4, _attention, Allgather, MASKS["not causal"], "head_tail"):
        ahead, back = (" ".join(way["events"]) for way in part[1])
        assert ahead == step + "compute"
        assert back == step + "compute post wait"


def test_bfloat16_travels_as_bfloat16_and_its_gradients_as_float32():
    parts = ranks.run(2, _attention, Ring, MASKS["whole"], "head_tail", torch.bfloat16)
    assert {t.dtype for part in parts for t in part[0]} == {torch.bfloat16}
    values = 3 * LENGTH // 4 * 2 * SHAPE[0] * SHAPE[2] * SHAPE[3]  # three quarters of every rank's K and V
    ahead, back = (sum(part[1][way]["bytes"] for part in parts) for way in (0, 1))
    assert ahead == 2 * values
    assert back == (2 + 4) * values


def test_the_error_in_float32_does_not_grow_with_the_number_of_ranks():
    x = Example.random(SHAPE, LENGTH, dtype=torch.float32, device="cpu")
    wanted, errors = reference(x, MASKS["whole"]), {}
    for world in (1, 8):
        parts = ranks.run(world, _attention, Ring, MASKS["whole"], "head_tail", torch.float32)
        joined = [_layout("head_tail", world).join([part[0][i] for part in parts], 2) for i in range(4)]
        errors[world] = [((got - want).norm() / want.norm()).item() for got, want in zip(joined, wanted)]
    assert all(many < 1.5 * one for one, many in zip(errors[1], errors[8])), errors


def _in_two_groups(scheme_class):
    """Ranks 0 and 2, and ranks 1 and 3, each work on a row of their own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    return _attention(scheme_class, MASKS["packed" if mine else "whole"], "head_tail", torch.float64, groups[mine])[0]


@pytest.mark.parametrize("scheme", [Ring, Allgather])
def test_a_group_need_not_be_the_first_ranks_nor_all(scheme):
    parts, layout = ranks.run(4, _in_two_groups, scheme), _layout("head_tail", 2)
    x = Example.random(SHAPE, LENGTH, dtype=torch.float64, device="cpu")
    for first, mask in ((0, "whole"), (1, "packed")):
        for i, wanted in enumerate(reference(x, MASKS[mask])):
            got = layout.join([parts[first][i], parts[first + 2][i]], 2)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def _on_all(scheme_class, mask, layout, shape):
    return _share(scheme_class, mask, layout, shape, torch.float64, dist.group.WORLD)


@pytest.mark.parametrize("world", WORLDS)
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_documents_heads_and_layout_equal_the_formula(world, data):
    mask = data.draw(masks(max_length=70))
    layout = data.draw(layouts(mask.length, degrees=(world,)))
    scheme = data.draw(st.sampled_from([Ring, Allgather]))
    batch, groups, repeats = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = (batch, groups * repeats, groups, data.draw(st.sampled_from([1, 4, 8])))
    parts = ranks.run(world, _on_all, scheme, mask, layout, shape)
    x = Example.random(shape, mask.length, dtype=torch.float64, device="cpu")
    for i, wanted in enumerate(reference(x, mask)):
        got = layout.join([part[0][i] for part in parts], 2)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert sum(part[1][0]["area"] for part in parts) == mask.area
    assert all((ahead["bytes"], back["bytes"]) == planned for _, (ahead, back), planned, _ in parts)
