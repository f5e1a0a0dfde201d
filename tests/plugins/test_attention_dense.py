"""The `dense` backend meets the contract, and its memory does not grow with the square of the length."""

import pytest
import torch

from zoo.core.attention.slices import local_slices
from zoo.core.contracts.attention import AttentionProblem
from zoo.core.sequence.mask import Mask
from zoo.plugins.attention import dense
from zoo.plugins.attention.dense import Dense
from zoo.testing.attention import AttentionContract, Example, reference


class TestDense(AttentionContract):
    @pytest.fixture
    def backend(self):
        return Dense()


class TestDenseInBlocks(AttentionContract):
    """The same with blocks of a few query rows."""

    @pytest.fixture
    def backend(self, monkeypatch):
        monkeypatch.setattr(dense, "MAX_SCORES", 1000)
        return Dense()


def test_heads_that_cannot_be_shared_are_refused():
    problem = AttentionProblem(device="cpu", dtype="float32", head_dim=8, num_heads=6, num_kv_heads=4)
    assert "6 query heads" in Dense().supports(problem)


@pytest.mark.parametrize("causal", [True, False])
def test_no_more_scores_exist_at_a_time_than_allowed(monkeypatch, causal):
    monkeypatch.setattr(dense, "MAX_SCORES", 4096)
    sizes = []
    scores = dense._scores
    monkeypatch.setattr(dense, "_scores", lambda *a, **k: sizes.append((s := scores(*a, **k)).numel()) or s)
    x = Example.random((1, 4, 2, 8), 256, dtype=torch.float64, device="cpu")
    mask = Mask.whole(256, causal=causal)
    slices = local_slices(mask, ((0, 256),))
    out, lse = Dense().forward(x.q, x.k, x.v, slices, x.scale)
    Dense().backward(x.dout, x.q, x.k, x.v, out, lse, slices, x.scale)
    assert max(sizes) <= 4096
    assert len(sizes) == 2 * 256 // (4096 // (4 * 256))
    # A causal block of rows stops at the last key it sees.
    assert sum(sizes) == 2 * 4 * (sum(range(4, 257, 4)) * 4 if causal else 256 * 256)
    torch.testing.assert_close(out, reference(x, mask)[0], rtol=0, atol=1e-12)
