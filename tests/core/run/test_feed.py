"""The feed is one step ahead on a thread of its own, reads no further than the run, and knows where each step was."""

import threading
import time

import numpy as np
import pytest
import torch

from tests.harness.patience import PATIENCE_S
from zoo.core.contracts.batch import IGNORE, PADDING, Row
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.data.collate import collate, row_mask
from zoo.core.data.packing import Stats
from zoo.core.errors import DataError
from zoo.core.run.feed import Feed

CPU = torch.device("cpu")


class Stream:
    """Rows of one document whose tokens are the row's number; fails at the row `broken`."""

    def __init__(self, broken=None):
        self.taken, self.broken = 0, broken

    def take(self, count):
        rows = []
        for _ in range(count):
            if self.taken == self.broken:
                raise DataError(f"row {self.taken} is broken")
            tokens = np.full(8, self.taken)
            rows.append(Row(tokens=tokens, labels=tokens.copy(), documents=((0, 8),)))
            self.taken += 1
        return rows

    def state_dict(self):
        return {"row": self.taken}

    @property
    def stats(self):
        return Stats(rows=self.taken)

    fill = 1.0


class Alone:
    """The mesh of one rank."""

    def rank(self, axis):
        return 0

    def size(self, axis):
        return 1


class Cutter:
    """An adapter that notes on which thread it cut what."""

    def __init__(self):
        self.cut = []

    def shard_batch(self, batch, mesh, layout):
        self.cut.append((threading.current_thread().name, int(batch.tokens[0, 0])))
        return batch


def _feed(stream, steps, adapter=None, windows=(), **kwargs):
    return Feed(
        stream,
        mesh=Alone(),
        adapters=[adapter] if adapter else [],
        layout=Layout(seq=8, microbatches=2, model=ModelFacts(layer_windows=windows)),
        steps=steps,
        **kwargs,
    )


def _until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_the_next_step_is_made_while_this_one_is_used():
    stream, cutter = Stream(), Cutter()
    feed = _feed(stream, 3, cutter)
    first = feed.step(CPU)
    assert _until(lambda: len(cutter.cut) == 4), "nobody asked for the second step yet, and it is there"
    assert [int(batch.tokens[0, 0]) for batch in first.batches] == [0, 1]
    assert {name for name, _ in cutter.cut} == {"feed_0"}
    assert first.position.cursor == {"row": 2}, "a save after the first step goes on with the second"
    assert (stream.taken, first.position.stats.rows) == (4, 2)


def test_nothing_is_read_beyond_the_last_step():
    stream = Stream()
    feed = _feed(stream, 2)
    positions = [feed.step(CPU).position.cursor["row"] for _ in range(2)]
    feed.close()
    assert (positions, stream.taken) == ([2, 4], 4)
    with pytest.raises(AssertionError, match="as many steps"):
        feed.step(CPU)


def test_an_error_in_reading_is_raised_by_the_step_it_belongs_to():
    feed = _feed(Stream(broken=3), 5)
    feed.step(CPU)
    with pytest.raises(DataError, match="row 3 is broken"):
        feed.step(CPU)


def test_padding_has_a_position_of_its_own_and_is_not_counted():
    row = Row(tokens=np.arange(10), labels=np.full(10, IGNORE), documents=((1, 4), (5, 9)))
    empty = Row(tokens=np.arange(10), labels=np.full(10, IGNORE), documents=())
    batch = collate([row, empty])
    assert batch.positions[0].tolist() == [PADDING, 0, 1, 2, PADDING, 0, 1, 2, 3, PADDING] + [PADDING] * 10
    assert (row.document_tokens, batch.document_tokens, batch.to(CPU).document_tokens) == (7, 7, 7)


def test_visible_keys_are_the_mean_over_layers():
    plain = _feed(Stream(), 1).step(CPU).mean_visible_keys
    windowed = _feed(Stream(), 1, windows=[2]).step(CPU).mean_visible_keys
    assert (plain, windowed) == (36 / 8, 15 / 8)
    assert _feed(Stream(), 1, windows=[None, None, None, 2]).step(CPU).mean_visible_keys == (3 * plain + windowed) / 4
    assert _feed(Stream(), 1, mask="full").step(CPU).mean_visible_keys == 8


def test_a_prompt_is_what_lies_before_the_first_trained_token():
    labels = np.array([IGNORE, IGNORE, 5, 6, IGNORE, 7, 8, IGNORE, IGNORE, IGNORE])
    documents = ((0, 4), (4, 7), (7, 10))
    assert row_mask(10, documents, labels, "prefix").prefixes == (3, 2, 3)
    assert not row_mask(10, documents, labels, "full").causal
    row = Row(tokens=np.arange(10), labels=labels, documents=documents)
    mask = collate([row, row], mask="prefix").mask
    assert (mask.prefixes, mask.length) == ((3, 2, 3) * 2, 20)
    assert collate([row]).mask.prefixes == ()
