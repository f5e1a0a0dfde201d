"""A step is the same function of its rows however they are split into microbatches."""

import numpy as np
import pytest
import torch
from torch import nn

from zoo.core.contracts.batch import Row
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import Losses
from zoo.core.contracts.parallel import Counts, ParallelAdapter
from zoo.core.data.collate import collate
from zoo.core.run.assemble import forward_backward
from zoo.core.run.step import TrainState, train_step

LENGTH = 6
LAYOUT = Layout(seq=LENGTH, dtype="float64")


class Counting(nn.Module):
    """A bigram model that reports the share of each parity among its tokens, and trains on it once a row."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens, positions, mask, labels):
        loss = nn.functional.cross_entropy(self.scores[tokens[0]], labels[0], reduction="sum")
        odd = (tokens % 2).double().mean()
        rows = (self.scores[tokens[0]].mean(1)).mean()
        return Losses(loss, rows, {"parity": torch.stack([1 - odd, odd])})


def rows(count):
    rng = np.random.default_rng(1)
    for _ in range(count):
        tokens = rng.integers(0, 8, LENGTH)
        yield Row(tokens=tokens, labels=rng.integers(0, 8, LENGTH), documents=((0, LENGTH),))


def step(split):
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model=model, optimizer=optimizer, schedule=lambda _step: 1.0, lr=0.1, clip=0.0)
    every = list(rows(sum(split)))
    batches, start = [], 0
    for size in split:
        batches.append(collate(every[start : start + size]))
        start += size
    return train_step(state, batches, Counts(LENGTH * sum(split), sum(split), LENGTH * sum(split))), model


@pytest.mark.parametrize("split", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 2, 1)])
def test_microbatches_do_not_matter(split):
    one, whole = step((4,))
    result, model = step(split)
    torch.testing.assert_close(result.loss, one.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.report["parity"], one.report["parity"], rtol=1e-12, atol=0)
    torch.testing.assert_close(model.scores, whole.scores, rtol=1e-12, atol=1e-15)
    assert result.report["parity"].sum().item() == pytest.approx(1)


def test_adapters_that_listen_are_told_which_microbatch_is_the_last():
    class Listening(ParallelAdapter):
        def begin_microbatch(self, model, *, last):
            told.append((model, last))

    told, model = [], Counting()
    stepped = forward_backward(model, None, mesh=None, layout=LAYOUT, adapters=[ParallelAdapter(), Listening()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, lambda _step: 1.0, lr=0.1, clip=0.0, forward_backward=stepped)
    for _ in range(2):
        train_step(state, [collate([row]) for row in rows(3)], Counts(LENGTH * 3, 3, LENGTH * 3))
    assert told == [(model, False), (model, False), (model, True)] * 2
