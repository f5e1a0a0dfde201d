"""The `flex` backend meets the contract on the CPU; its block tables, and that its CUDA path can be traced."""

import pytest
import torch

from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import AttentionProblem, AttentionSlice, SliceRule
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention import flex, flex_blocks
from zoo.plugins.attention.bands import launches
from zoo.plugins.attention.flex import Flex
from zoo.testing.attention import MASKS, AttentionContract, Example, reference, shared_attention

FULL, CAUSAL = SliceRule.FULL, SliceRule.CAUSAL


class TestFlex(AttentionContract):
    @pytest.fixture
    def backend(self):
        return Flex()


@pytest.mark.parametrize("mask", [MASKS["packed with padding"], Mask.whole(96)], ids=["packed", "whole"])
def test_pieces_of_rows_add_up(monkeypatch, mask):
    monkeypatch.setattr(flex, "MAX_SCORES", 16000)
    x, layout = Example.random((2, 4, 2, 8), 96, dtype=torch.float64, device="cpu"), SequenceLayout.head_tail(96, 2)
    for got, wanted in zip(shared_attention(Flex(), x, mask, layout), reference(x, mask), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-10)


def _problem(**changes):
    fields = dict(device="cuda", dtype="bfloat16", head_dim=100, num_heads=8, num_kv_heads=2)
    return AttentionProblem(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "version", "reason"),
    [
        ({}, "2.13.0", None),
        ({"dtype": "float32"}, "2.12.1+cu130", None),
        ({}, "2.11.0", "from torch 2.12 on, and this is 2.11.0"),
        ({"dtype": "float64"}, "2.13.0", "does not compute float64"),
        ({"head_dim": 8}, "2.13.0", "from 16 to 256, not 8"),
        ({"num_kv_heads": 3}, "2.13.0", "evenly"),
        ({"device": "mps"}, "2.13.0", "'mps'"),
        ({"device": "cpu", "dtype": "float64", "head_dim": 3}, "2.11.0", None),
    ],
)
def test_supports_says_why_not(monkeypatch, changes, version, reason):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: name)
    answer = Flex().supports(_problem(**changes))
    assert (answer is None) if reason is None else reason in answer


def test_without_triton_there_is_no_flex_on_cuda(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in Flex().supports(_problem())


def test_no_more_scores_exist_at_a_time_than_allowed(monkeypatch):
    monkeypatch.setattr(flex, "MAX_SCORES", 4096)
    areas = []
    forward = flex._forward
    monkeypatch.setattr(flex, "_forward", lambda q, k, *a: areas.append(q.shape[2] * k.shape[2]) or forward(q, k, *a))
    x = Example.random((1, 4, 2, 8), 256, dtype=torch.float64, device="cpu")
    out, _ = Flex().forward(x.q, x.k, x.v, local_slices(Mask.whole(256), ((0, 256),)), x.scale)
    assert max(areas) * 4 <= 4096
    # Rows stop at the last key they see.
    assert sum(areas) == sum(stop * 4 for stop in range(4, 257, 4))
    torch.testing.assert_close(out, reference(x, Mask.whole(256))[0], rtol=0, atol=1e-12)


LAUNCHES = {
    "causal": [AttentionSlice(0, 300, 0, 300, CAUSAL)],
    "window": [AttentionSlice(i, i + 64, max(0, i - 128), i, FULL) for i in range(64, 640, 64)]
    + [AttentionSlice(i, i + 64, i, i + 64, CAUSAL) for i in range(0, 640, 64)],
    "documents": [AttentionSlice(a, b, a, b, CAUSAL) for a, b in ((3, 200), (200, 201), (230, 700))],
    "other rank": [AttentionSlice(10, 90, 0, 500, FULL), AttentionSlice(90, 400, 512, 600, FULL)],
}


@pytest.mark.parametrize("slices", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_block_tables_say_exactly_which_blocks_are_seen_and_which_whole(slices):
    (launch,) = launches(slices, Flex.may_follow)
    tokens, keys, size = 704, 700, 64
    visible = torch.zeros(tokens, 704, dtype=torch.bool)
    for s in slices:
        part = visible[s.q_start : s.q_stop, s.k_start : s.k_stop]
        part |= torch.ones_like(part).tril() if s.rule is CAUSAL else torch.ones_like(part)
    intervals = flex_blocks.Intervals.of(launch, tokens)
    index = torch.arange(704)
    assert torch.equal((index >= intervals.first[:, None]) & (index < intervals.last[:, None]), visible)
    blocks = visible.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(2)
    seen, whole = flex_blocks.block_tables(launch, tokens, keys, size)
    assert torch.equal(seen, blocks.any(-1))
    assert torch.equal(whole, blocks.all(-1))


@pytest.mark.parametrize(("length", "size"), [(1, 128), (2048 * 128, 128), (2048 * 128 + 1, 256), (1 << 20, 512)])
def test_tables_stay_small_for_long_rows(length, size):
    assert flex_blocks.block_size(length) == size


def test_what_cuda_compiles_can_be_traced_whole_for_any_size(monkeypatch):
    """With the real block masks and without the code generator, which needs CUDA."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(flex, "_compile", lambda f: compiled[f])
    compiled = {f: torch.compile(f, backend=keep, fullgraph=True) for f in (flex._forward, flex._backward)}
    for tokens in (40, 30, 24, 50):
        x = Example.random((1, 4, 2, 16), tokens, dtype=torch.float64, device="cpu")
        mask = Mask(tokens, ((0, 7), (9, tokens)))
        (launch,) = launches(local_slices(mask, ((0, tokens),)), Flex.may_follow)
        blocks = flex_blocks.block_mask(launch, tokens, tokens, x.q.device)
        out, lse = flex._compiled(flex._forward, x.q, x.k, x.v, blocks, x.scale)
        grads = flex._compiled(flex._backward, x.q, x.k, x.v, out, lse, x.dout, blocks, x.scale, None)
        for got, wanted in zip((out, *grads), reference(x, mask), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert len(graphs) == 4  # each once as it is and once for any size
