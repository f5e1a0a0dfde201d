"""Merging parts equals softmax over all keys, in place, without overflow and without NaN."""

import pytest
import torch

from zoo.core.attention.merge import accumulation_dtype, merge_


def _part(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("size", [1.0, 700.0, 1e5])
def test_parts_merge_to_the_softmax_over_all_keys(size):
    torch.manual_seed(0)
    scores = size * torch.randn(2, 3, 7, 20, dtype=torch.float64)
    values = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    out, lse = _part(scores[..., :5], values[..., :5, :])
    memory = out.data_ptr(), lse.data_ptr()
    for start, stop in ((5, 6), (6, 20)):
        merge_(out, lse, *_part(scores[..., start:stop], values[..., start:stop, :]))
    wanted = _part(scores, values)
    torch.testing.assert_close(out, wanted[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-14, atol=1e-13)
    assert (out.data_ptr(), lse.data_ptr()) == memory


def test_sides_without_keys_change_nothing_and_make_no_nan():
    full, none = (
        (torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2)),
        (torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf)),
    )
    for first, second, wanted in ((full, none, full), (none, full, full), (none, none, none)):
        out, lse = first[0].clone(), first[1].clone()
        merge_(out, lse, *second)
        assert torch.equal(out, wanted[0])
        assert torch.equal(lse, wanted[1])


def test_half_precision_parts_are_added_in_float32():
    out, lse = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -torch.inf)
    for _ in range(1000):
        merge_(out, lse, torch.full((1, 1, 1, 1), 1.0078125, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.item(), 1.0078125, rtol=1e-6, atol=0)
    assert [accumulation_dtype(d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
