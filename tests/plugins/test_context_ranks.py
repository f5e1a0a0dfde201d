"""The context schemes on real gloo ranks: results equal the formula, work and traffic equal the plan."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.core.attention.draw import layouts, masks
from tests.core.attention.formula import Formula
from tools.rounding import rounding
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.contracts.attention import AttentionProblem, HeadShape, Link
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.ranges import count
from zoo.plugins.attention.dense import Dense
from zoo.plugins.attention.flex import Flex
from zoo.plugins.attention.sdpa import Sdpa
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.halo import Halo
from zoo.plugins.context.heads import share_heads
from zoo.plugins.context.hybrid import Hybrid
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ulysses import Ulysses
from zoo.testing import ranks
from zoo.testing.attention import Example, reference, reference_lse

pytestmark = pytest.mark.dist

WORLDS = (1, 2, 3, 4, 8)
LENGTH = 96
SHAPE = (2, 8, 2, 8)
"""B, N, G, H: eight query heads, so that heads can be dealt out to eight ranks, over two key/value heads."""
SCHEMES = {
    "ring": Ring,
    "allgather": Allgather,
    "ulysses": Ulysses,
    "hybrid": Hybrid,
    "halo": Halo,
}
MASKS = {
    "whole": Mask.whole(LENGTH),
    "one spans all ranks, padding at both ends": Mask(LENGTH, ((14, 83),)),
    "packed": Mask(LENGTH, ((0, 5), (5, 31), (31, 32), (40, 77), (77, 96))),
    "tiny": Mask(LENGTH, tuple((at, at + 2) for at in range(1, 95, 2))),
    "ranks with only padding": Mask(LENGTH, ((40, 56),)),
    "only padding": Mask(LENGTH, ()),
    "full": Mask(LENGTH, ((3, 50), (50, 96)), causal=False),
    "prefixes": Mask(LENGTH, ((3, 50), (50, 96)), prefixes=(20, 0)),
    "a window": Mask.whole(LENGTH, window=20),
    "a small window over documents": Mask(LENGTH, ((0, 5), (5, 71), (75, 96)), window=5),
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


class Logged:
    """A backend that logs its calls and counts the scores of its slices."""

    def __init__(self, backend, events):
        self.backend, self.events, self.name, self.scores = backend, events, backend.name, 0

    def forward(self, q, k, v, slices, scale):
        self._log(q, slices)
        return self.backend.forward(q, k, v, slices, scale)

    def backward(self, dout, q, k, v, out, lse, slices, scale):
        self._log(q, slices)
        return self.backend.backward(dout, q, k, v, out, lse, slices, scale)

    def _log(self, q, slices):
        self.events.append("compute")
        self.scores += q.shape[0] * q.shape[1] * sum(s.area for s in slices)


def _attention(scheme, mask, kind, dtype=torch.float64, group=None, wire=None):
    """Attention of this rank under a named layout of the usual length and shape; as `_share`."""
    group = group or dist.group.WORLD
    return _share(scheme, mask, _layout(kind, dist.get_world_size(group)), SHAPE, dtype, Link(group, wire))


def _share(scheme, mask, layout, shape, dtype, link, backend=None):
    """out, dq, dk, dv of this rank, lse as the scheme leaves it, and what was seen and planned each way."""
    rank = dist.get_rank(link.group)
    x = Example.random(shape, mask.length, dtype=dtype, device="cpu")
    q, k, v, dout = (layout.take(t, rank, 2).detach().clone() for t in (x.q, x.k, x.v, x.dout))
    for t in (q, k, v):
        t.requires_grad_()
    sharded, reports, lse = ShardedMask(mask, layout, rank), [], []
    recorded = Recorded(scheme, lse)
    with Spy(link.group) as spy:
        logged = Logged(backend or Formula(), spy.events)
        out = AttentionSeam(logged, Exchange(scheme=recorded, link=link))(q, k, v, sharded)
        reports.append(_report(spy, logged))
    with Spy(link.group) as spy:
        logged.events, logged.scores = spy.events, 0
        grads = torch.autograd.grad(out, (q, k, v), dout)
        reports.append(_report(spy, logged))
    heads = HeadShape(num_heads=shape[1], num_kv_heads=shape[2], head_dim=shape[3])
    value, gradient = (link.carried(t).itemsize for t in (dtype, torch.promote_types(dtype, torch.float32)))
    stages = sharded.plan(recorded, None, heads).stages(value, gradient)
    planned = [
        {"bytes": shape[0] * sum(s.sent for s in way), "scores": shape[0] * sum(s.scores for s in way)}
        for way in stages
    ]
    return [t.detach() for t in (out, *grads)], lse[0], reports, planned


class Recorded:
    """A scheme whose saved lse is looked at."""

    def __init__(self, scheme, lse):
        self.scheme, self._lse, self.name = scheme, lse, scheme.name

    def plan(self, *arguments):
        return self.scheme.plan(*arguments)

    def forward(self, *arguments):
        out, saved = self.scheme.forward(*arguments)
        self._lse.append(saved[-1])
        return out, saved

    def backward(self, *arguments):
        return self.scheme.backward(*arguments)


def _report(spy, logged):
    return {
        "scores": logged.scores,
        "bytes": spy.bytes,
        "events": spy.events,
        "buffers": {tag: len(found) for tag, found in spy.buffers.items()},
    }


def check_equal(scheme, mask, layout, shape, parts):
    """Everything ranks computed equals the formula in fp64, and what they sent and computed the plan and the mask."""
    x = Example.random(shape, mask.length, dtype=torch.float64, device="cpu")
    for i, wanted in enumerate(reference(x, mask)):
        got = layout.join([part[0][i] for part in parts], 2)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    lse, heads = reference_lse(x, mask), HeadShape(num_heads=shape[1], num_kv_heads=shape[2], head_dim=shape[3])
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part[1], _lse_of(scheme, rank, lse, layout, heads), rtol=0, atol=1e-10)
        for report, planned in zip(part[2], part[3]):
            assert report["bytes"] == planned["bytes"]
            assert report["scores"] == planned["scores"]
    for way in (0, 1):
        assert sum(part[2][way]["scores"] for part in parts) == mask.area * shape[0] * shape[1]


def _lse_of(scheme, rank, lse, layout, heads):
    """The rows and heads of lse that a rank computes."""
    if not isinstance(scheme, Hybrid):
        return layout.take(lse, rank, 2)
    inner = scheme.inner(heads, layout.degree)
    first = rank - rank % inner
    rows = sorted(part for r in range(first, first + inner) for part in layout.chunks[r])
    share = share_heads(heads, inner)[rank % inner]
    return torch.cat([lse[:, slice(*share.query), a:b] for a, b in rows] or [lse[:, slice(*share.query), :0]], 2)


def _all_cases(scheme, kind):
    return {name: _attention(scheme, mask, kind) for name, mask in MASKS.items()}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("world", WORLDS)
def test_results_equal_the_formula_and_counters_the_plan(world, scheme, kind):
    scheme = SCHEMES[scheme]()
    answers = ranks.run(world, _all_cases, scheme, kind)
    for name, mask in MASKS.items():
        check_equal(scheme, mask, _layout(kind, world), SHAPE, [answer[name] for answer in answers])


def _on_all(scheme, mask, layout, shape, backend):
    return _share(scheme, mask, layout, shape, torch.float64, Link(dist.group.WORLD), backend)


@pytest.mark.parametrize("world", range(1, 9))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_mask_scheme_kernel_heads_and_layout_equal_the_formula(world, data):
    mask = data.draw(masks(max_length=70))
    layout = data.draw(layouts(mask.length, degrees=(world,)))
    batch, groups, repeats = (data.draw(st.integers(1, n)) for n in (2, 3, 4))
    shape = (batch, groups * repeats, groups, data.draw(st.sampled_from([1, 4, 8])))
    factors = [n for n in range(1, world + 1) if world % n == 0]
    scheme = data.draw(
        st.sampled_from([Ring(), Allgather(), Halo(), Ulysses(), Hybrid(), *(Hybrid(n) for n in factors)])
    )
    problem = AttentionProblem(
        device="cpu", dtype="float64", head_dim=shape[3], num_heads=shape[1], num_kv_heads=shape[2]
    )
    backend = data.draw(st.sampled_from([Formula(), Dense(), Sdpa(), Flex()]))
    if scheme.check(problem, mask.length, world) is not None:
        assert isinstance(scheme, Hybrid)
        scheme = Hybrid(1)
    if backend.supports(problem) is not None:
        backend = Formula()
    check_equal(scheme, mask, layout, shape, ranks.run(world, _on_all, scheme, mask, layout, shape, backend))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_ring_meets_its_formulas_on_the_wire(world):
    parts = ranks.run(world, _attention, Ring(), MASKS["whole"], "head_tail")
    batch, _, groups, size = SHAPE
    kv = 2 * (LENGTH // world) * batch * groups * size * 8
    sent = [part[2][0]["bytes"] for part in parts]
    assert max(sent) <= (world - 1) * kv
    assert sum(sent) == 0.75 * world * (world - 1) * kv
    scores = [part[2][0]["scores"] for part in parts]
    assert max(scores) * world == sum(scores)
    for part in parts:
        ahead, back = part[2]
        assert ahead["buffers"] == {0: min(2, world)}
        assert back["buffers"] == {0: 2, 1: 2}


@pytest.mark.parametrize("window", [2, 7, 24])
def test_the_halo_is_no_wider_than_the_window(window):
    parts = ranks.run(4, _attention, Halo(), Mask.whole(LENGTH, window=window), "contiguous")
    batch, _, groups, size = SHAPE
    row = 2 * batch * groups * size * 8
    rows = window - 1
    assert [part[2][0]["bytes"] for part in parts] == [row * rows] * 3 + [0]
    assert [part[2][1]["bytes"] for part in parts] == [row * rows, *[2 * row * rows] * 2, row * rows]


@pytest.mark.parametrize("scheme", ["ring", "allgather", "halo"])
def test_documents_that_cross_no_rank_send_nothing(scheme):
    mask = Mask(LENGTH, tuple((at, at + 4) for at in range(0, LENGTH, 4)))
    for part in ranks.run(4, _attention, SCHEMES[scheme](), mask, "head_tail"):
        assert [way["bytes"] for way in part[2]] == [0, 0]
        assert "post" not in part[2][0]["events"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_heads_are_replicated_only_when_there_are_fewer_than_ranks(world):
    batch, heads, groups, size = SHAPE
    for part in ranks.run(world, _attention, Ulysses(), MASKS["packed"], "contiguous"):
        others = (world - 1) / world
        rows, kept = LENGTH // world, max(groups, world)
        ahead, back = (way["bytes"] for way in part[2])
        assert ahead == batch * rows * (2 * heads + 2 * kept) * others * size * 8
        assert back == ahead


def test_the_next_step_travels_while_this_one_is_computed():
    step = "post compute wait "
    for part in ranks.run(4, _attention, Ring(), MASKS["full"], "head_tail"):
        ahead, back = (" ".join(way["events"]) for way in part[2])
        assert ahead == 3 * step + "compute"
        # Own keys; three steps, of which the first two send their gradients on while the next one is computed; home.
        assert back == step + "post compute post wait " + "post compute wait post wait " + "compute wait post wait"
    for part in ranks.run(4, _attention, Halo(), MASKS["full"], "head_tail"):
        ahead, back = (" ".join(way["events"]) for way in part[2])
        assert ahead == step + "compute"
        assert back == step + "compute post wait"
    for part in ranks.run(4, _attention, Allgather(), MASKS["full"], "head_tail"):
        ahead, back = (" ".join(way["events"]) for way in part[2])
        assert ahead == step + step + "compute"
        assert back == step + "post compute post wait compute wait post wait"


def test_bfloat16_travels_as_bfloat16_and_its_gradients_as_float32():
    parts = ranks.run(2, _attention, Ring(), MASKS["whole"], "head_tail", torch.bfloat16)
    assert {t.dtype for part in parts for t in part[0]} == {torch.bfloat16}
    values = 3 * LENGTH // 4 * 2 * SHAPE[0] * SHAPE[2] * SHAPE[3]  # three quarters of every rank's K and V
    ahead, back = (sum(part[2][way]["bytes"] for part in parts) for way in (0, 1))
    assert ahead == 2 * values
    assert back == (2 + 4) * values


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_may_travel_as_bfloat16(scheme):
    narrow, wide = (
        ranks.run(4, _attention, SCHEMES[scheme](), MASKS["packed"], "head_tail", torch.float32, None, wire)
        for wire in (torch.bfloat16, None)
    )
    layout, x = _layout("head_tail", 4), Example.random(SHAPE, LENGTH, dtype=torch.float32, device="cpu")
    for less, more in zip(narrow, wide):
        assert [2 * way["bytes"] for way in less[2]] == [way["bytes"] for way in more[2]]
        assert {t.dtype for t in less[0]} == {torch.float32}
    for i, wanted in enumerate(reference(x, MASKS["packed"])):
        joined = [layout.join([part[0][i] for part in parts], 2) for parts in (narrow, wide)]
        errors = [((got - wanted).norm() / wanted.norm()).item() for got in joined]
        # Units in the last place of either type, of which sums of a hundred make a few.
        assert errors[1] < 16 * torch.finfo(torch.float32).eps < errors[0] < 2 * torch.finfo(torch.bfloat16).eps


def test_the_error_in_float32_does_not_grow_with_the_number_of_ranks():
    """It is what the formula may be off by in fp32, on eight ranks as on one."""
    x = Example.random(SHAPE, LENGTH, dtype=torch.float32, device="cpu")
    share = rounding(lambda: dict(enumerate(reference(x, MASKS["whole"]))), torch.float32)
    for world in (1, 8):
        parts = ranks.run(world, _attention, Ring(), MASKS["whole"], "head_tail", torch.float32)
        for i in range(4):
            assert share(i, _layout("head_tail", world).join([part[0][i] for part in parts], 2)) <= 1


def _in_two_groups(scheme):
    """Ranks 0 and 2, and ranks 1 and 3, each work on a row of their own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    return _attention(scheme, MASKS["packed" if mine else "whole"], "head_tail", torch.float64, groups[mine])[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_need_not_be_the_first_ranks_nor_all(scheme):
    parts, layout = ranks.run(4, _in_two_groups, SCHEMES[scheme]()), _layout("head_tail", 2)
    x = Example.random(SHAPE, LENGTH, dtype=torch.float64, device="cpu")
    for first, mask in ((0, "whole"), (1, "packed")):
        for i, wanted in enumerate(reference(x, MASKS[mask])):
            got = layout.join([parts[first][i], parts[first + 2][i]], 2)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_rows_of_every_rank_are_the_layouts():
    for kind in LAYOUTS:
        assert sum(count(chunks) for chunks in _layout(kind, 4).chunks) == LENGTH
