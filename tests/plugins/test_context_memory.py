"""Memory of a step of attention on real gloo ranks, by counting live tensors: it is a rank's share, at any degree."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.core.contracts.attention import HeadShape, Link
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention.sdpa import Sdpa
from zoo.plugins.context.allgather import Allgather
from zoo.plugins.context.halo import Halo
from zoo.plugins.context.hybrid import Hybrid
from zoo.plugins.context.ring import Ring
from zoo.plugins.context.ulysses import Ulysses
from zoo.testing import ranks

pytestmark = pytest.mark.dist

WORLDS = (2, 4, 8)
SHARE = 96
"""Tokens of a rank where the row grows with the ranks."""
HEADS = HeadShape(num_heads=16, num_kv_heads=8, head_dim=32)


class LiveTensors(TorchDispatchMode):
    """Bytes of storages that operators have made and somebody still holds: now, and at most so far."""

    def __init__(self, *held):
        super().__init__()
        self._storages, self.peak = {}, 0
        self._count(held)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self._count(result)
        return result

    @property
    def live(self):
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        return sum(size for _, size in self._storages.values())

    def _count(self, result):
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, self.live)


class Buffers:
    """Sizes of the storages that went through torch's point-to-point calls, by tag."""

    def __init__(self):
        self.sizes = {}

    def __enter__(self):
        self._inner, dist.batch_isend_irecv = dist.batch_isend_irecv, self._post
        return self

    def __exit__(self, *_):
        dist.batch_isend_irecv = self._inner

    def _post(self, operations):
        for op in operations:
            storage = op.tensor.untyped_storage()
            self.sizes.setdefault(op.tag, {})[storage.data_ptr()] = storage.nbytes()
        return self._inner(operations)


def _step(scheme, mask, kind):
    """Peak bytes forward and backward beyond q, k, v, dout and what is saved; bytes of buffers on the wire."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    layout = getattr(SequenceLayout, kind)(mask.length, degree)
    plan, link = scheme.plan(mask, layout, rank, HEADS), Link(dist.group.WORLD)
    q, k, v, dout = (
        torch.randn(1, n, layout.local_length(rank), HEADS.head_dim)
        for n in (HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads, HEADS.num_heads)
    )
    report = {}
    with Buffers() as buffers, LiveTensors(q, k, v) as memory:
        before = memory.live
        out, saved = scheme.forward(Sdpa(), plan, link, q, k, v, HEADS.head_dim**-0.5)
        report["forward"] = memory.peak - before
    report["keys"] = sorted(buffers.sizes.get(0, {}).values())
    with Buffers() as buffers, LiveTensors(q, k, v, dout, out, *saved) as memory:
        before = memory.live
        grads = scheme.backward(Sdpa(), plan, link, dout, saved, HEADS.head_dim**-0.5)
        report["backward"] = memory.peak - before
    report["sums"] = sorted(buffers.sizes.get(1, {}).values())
    assert len(grads) == 3  # held until here, as autograd holds them
    return report


def _peaks(scheme, rows, mask, kind="head_tail"):
    """In shares of K and V, the largest peak of any rank forward and backward, by number of ranks; all reports too."""
    found, reports = {}, {}
    for world in WORLDS:
        reports[world] = ranks.run(world, _step, scheme, mask(rows(world)), kind)
        share = _share(rows(world) // world)
        found[world] = [max(part[way] for part in reports[world]) / share for way in ("forward", "backward")]
    return found, reports


def _share(rows):
    """Bytes of K and V of so many rows."""
    return 2 * rows * HEADS.num_kv_heads * HEADS.head_dim * 4


def _full(rows):
    return Mask.whole(rows, causal=False)


def _window(rows):
    return Mask.whole(rows, window=SHARE // 2)


GROWING, FIXED = (lambda world: SHARE * world), (lambda world: SHARE * max(WORLDS))
"""The row's length: so many tokens a rank, or so many in all."""


@pytest.mark.parametrize("rows", [GROWING, FIXED], ids=["N/P fixed", "N fixed"])
def test_the_ring_holds_the_same_number_of_shares_at_any_degree(rows):
    """In shares: so it is constant while a share is, and falls as 1/P while the row is."""
    peaks, _ = _peaks(Ring(), rows, _full)
    assert peaks[2] == pytest.approx(peaks[4], rel=0.02)
    assert peaks[4] == pytest.approx(peaks[8], rel=0.02)
    # Forward: out and lse, and the step's; backward: dq, dk, dv and the step's; two buffers of keys, two of sums.
    assert peaks[8][0] < 4.3
    assert peaks[8][1] < 8.3


@pytest.mark.parametrize("rows", [GROWING, FIXED], ids=["N/P fixed", "N fixed"])
def test_a_causal_ring_holds_no_more_than_one_that_sees_everything(rows):
    causal, full = (_peaks(Ring(), rows, mask)[0] for mask in (Mask.whole, _full))
    for world in WORLDS:
        assert causal[world][0] <= 1.01 * full[world][0]
        assert causal[world][1] <= 1.01 * full[world][1]
    assert causal[4] == pytest.approx(causal[8], rel=0.02)


@pytest.mark.parametrize("mask", [_full, Mask.whole, _window], ids=["full", "causal", "a window"])
def test_the_ring_has_two_buffers_of_keys_and_two_of_sums(mask):
    _, reports = _peaks(Ring(), GROWING, mask)
    for parts in reports.values():
        for part in parts:
            for sizes in (part["keys"], part["sums"]):
                assert len(sizes) <= 2
                assert max(sizes, default=0) <= _share(SHARE)
        assert max(len(part["keys"]) for part in parts) == 2


def test_what_is_gathered_is_bounded_while_there_are_heads_to_take_turns():
    """About two shares of keys beside the own ones, at 2 ranks as at 8; backward also their sums in fp32."""
    peaks, reports = _peaks(Allgather(), GROWING, _full)
    assert [ahead for ahead, _ in peaks.values()] == pytest.approx([3.1] * 3, rel=0.03)
    assert peaks[8][1] < 1.1 * peaks[4][1] < 8.0
    for world, parts in reports.items():
        groups = min(world, HEADS.num_kv_heads)
        for part in parts:
            assert max(part["keys"]) <= (world - 1) * _share(SHARE) / groups


def test_a_scheme_that_holds_every_row_would_be_seen():
    """`halo` fetches all heads of all visible rows at once: right for windows, and what the others must not do."""
    full, window = (_peaks(Halo(), GROWING, mask, "contiguous")[0] for mask in (_full, _window))
    assert full[8][0] > 2.5 * full[2][0]
    assert full[8][1] > 4 * full[2][1]
    assert window[8] == pytest.approx(window[4], rel=0.02)
    assert window[8][0] < full[4][0] * 1.5


@pytest.mark.parametrize("scheme", [Ulysses(), Hybrid(2)], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("rows", [GROWING, FIXED], ids=["N/P fixed", "N fixed"])
def test_dealt_heads_take_a_share_of_the_whole_row(rows, scheme):
    peaks, _ = _peaks(scheme, rows, _full)
    # What stays on the rank is not packed for anybody: (P-1)/P of a share is.
    assert peaks[4] == pytest.approx(peaks[8], rel=0.05)
    assert all(few <= 1.02 * many for few, many in zip(peaks[2], peaks[8], strict=True))
    assert peaks[8][0] < 6.5
    assert peaks[8][1] < 9.5


def test_live_tensors_are_counted_once_while_somebody_holds_them():
    held = torch.empty(100)
    with LiveTensors(held) as memory:
        assert memory.live == 400
        more = torch.zeros(50, dtype=torch.float64)
        view = more[10:].view(4, 10)
        assert memory.live == 800
        del more
        assert memory.live == 800
        del view
        assert (memory.live, memory.peak) == (400, 800)
        (torch.ones(10) + torch.ones(10)).sum()
        assert memory.peak == 800
