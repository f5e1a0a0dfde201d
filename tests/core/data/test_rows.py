"""Rows: every token once an epoch, documents apart, labels right at each border, resumable anywhere."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from zoo.core.contracts.batch import IGNORE
from zoo.core.contracts.data import Record, Remark
from zoo.core.data import packing as windows
from zoo.core.data.corpus import Corpus
from zoo.core.data.documents import Document, best_fit_decreasing
from zoo.core.data.remarks import Remarks
from zoo.core.data.rows import RowStream
from zoo.core.errors import DataError

PAD = 10_000_000


class Listed:
    """A source of records in lists; an offset is one more than a record's index."""

    def __init__(self, shards, fingerprint="same"):
        self.parts, self.fingerprint = shards, fingerprint
        self.reads = []

    def shards(self):
        return [str(i) for i in range(len(self.parts))]

    def read(self, shard, offset):
        for i in range(offset, len(self.parts[int(shard)])):
            self.reads.append((shard, i))
            yield Record(self.parts[int(shard)][i], f"{shard}:{i}"), i + 1


def numbered(shards):
    """Shards of document lengths as records whose tokens all differ, so that each token says where it is from."""
    first, made = 0, []
    for lengths in shards:
        made.append([])
        for length in lengths:
            made[-1].append({"first": first, "length": length})
            first += length + 1  # a gap, so that the next document does not continue this one
    return Listed(made), first


def to_document(record, *, overlong="split", trained=lambda tokens: tokens % 3 != 0):
    tokens = np.arange(record.fields["first"], record.fields["first"] + record.fields["length"], dtype=np.int32)
    return Document(tokens=tokens, trained=trained(tokens), overlong=overlong, where=record.where)


@contextmanager
def stream_of(source, seq=16, seed=0, window=48, convert=lambda r: to_document(r, trained=lambda t: t >= 0), **options):
    """Windows are made small, so that a handful of documents fills several."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(windows, "WINDOW_TOKENS", window))
        stack.enter_context(patch.object(windows, "WINDOW_ROWS", 2))
        stack.enter_context(patch("zoo.core.data.corpus.BLOCK_RECORDS", 3))
        stream = RowStream(source, convert, seq=seq, seed=seed, pad=PAD, **options)
        stack.callback(stream.close)
        yield stream


def epoch_of(stream):
    """The rows of the epoch that comes next."""
    rows = stream.take(1)
    number = stream.epoch
    while True:
        row = stream.take(1)[0]
        if stream.epoch != number:
            return rows
        rows.append(row)


def key(rows):
    return [(row.tokens.tolist(), row.labels.tolist(), row.documents) for row in rows]


corpora = st.lists(st.lists(st.integers(2, 60), min_size=0, max_size=12), min_size=1, max_size=5).filter(any)
longer = st.lists(st.lists(st.integers(4, 60), max_size=12), min_size=1, max_size=5).filter(any)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(2, 40), st.integers(0, 5))
def test_every_token_appears_once_an_epoch_but_for_pieces_of_one_token(shards, seq, seed):
    """Which no token comes before, so that they train nothing."""
    source, _ = numbered(shards)

    def kept(record):
        length, one_left = record["length"], record["length"] > seq and record["length"] % seq == 1
        return range(record["first"], record["first"] + length - one_left)

    expected = sorted(token for part in source.parts for record in part for token in kept(record))
    with stream_of(source, seq=seq, seed=seed) as stream:
        rows = epoch_of(stream)
    seen = sorted(t for row in rows for a, b in row.documents for t in row.tokens[a:b].tolist())
    assert seen == expected
    assert all(len(row.tokens) == len(row.labels) == seq for row in rows)


@settings(max_examples=60, deadline=None)
@given(longer, st.integers(2, 40))
def test_documents_are_apart_and_labels_stop_at_their_borders(shards, seq):
    source, end = numbered(shards)
    owner = {t: r["first"] for part in source.parts for r in part for t in range(r["first"], r["first"] + r["length"])}
    with stream_of(source, seq=seq, convert=to_document) as stream:
        rows = stream.take(12)
    for row in rows:
        inside = np.zeros(seq, bool)
        for (start, stop), after in zip(row.documents, [*[d[0] for d in row.documents[1:]], seq], strict=True):
            assert 0 <= start < stop <= after
            tokens = row.tokens[start:stop].tolist()
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert len({owner[t] for t in tokens}) == 1
            expected = [t + 1 if (t + 1) % 3 else IGNORE for t in tokens[:-1]] + [IGNORE]
            assert row.labels[start:stop].tolist() == expected
            inside[start:stop] = True
        assert (row.tokens[~inside] == PAD).all()
        assert (row.labels[~inside] == IGNORE).all()


@settings(max_examples=40, deadline=None)
@given(corpora, st.integers(2, 24), st.integers(0, 3), st.integers(0, 25), st.lists(st.integers(0, 6), max_size=6))
def test_resumed_rows_equal_the_uninterrupted_ones(shards, seq, seed, stop, takes):
    source, _ = numbered(shards)
    with stream_of(source, seq=seq, seed=seed) as whole:
        expected = key(whole.take(40))
        counts = whole.stats
    with stream_of(source, seq=seq, seed=seed) as first:
        assert key(first.take(stop)) == expected[:stop]
        saved = json.loads(json.dumps(first.state_dict()))
    with stream_of(source, seq=seq, seed=seed) as second:
        second.take(len(takes))
        second.load_state_dict(saved)
        rest = [row for count in [*takes, 40] for row in second.take(count)][: 40 - stop]
        assert key(rest) == expected[stop:]
    with stream_of(source, seq=seq, seed=seed) as third:
        third.load_state_dict(saved)
        third.take(40 - stop)
        assert third.stats == counts


def test_a_resumed_stream_reads_carried_pieces_again():
    source, _ = numbered([[9, 5, 20, 9, 3, 9, 30, 9, 9, 7] * 4])
    with stream_of(source) as whole:
        expected = key(whole.take(33))
    carried = 0
    with stream_of(source) as whole:
        for at in range(30):
            saved = json.loads(json.dumps(whole.state_dict()))
            carried += bool(saved["cursor"]["carried"])
            with stream_of(source) as other:
                other.load_state_dict(saved)
                assert key(other.take(3)) == expected[at : at + 3]
            whole.take(1)
    assert carried > 5


def test_state_is_small_and_independent_of_the_corpus():
    source, _ = numbered([[7] * 4000, [11] * 4000])
    with stream_of(source, seq=64, window=4096) as stream:
        stream.take(300)
        assert len(json.dumps(stream.state_dict())) < 2000


def test_order_depends_on_seed_and_epoch_only():
    source, _ = numbered([[16] * 6, [16] * 5, [16] * 7, [16]])
    with stream_of(source) as a, stream_of(source) as b, stream_of(source, seed=1) as c:
        first, second, other = epoch_of(a), a.take(19), epoch_of(c)
        assert key(first) == key(epoch_of(b))
    assert key(first) != key(other)
    assert key(first) != key(second)
    flat = [Counter(int(row.tokens[0]) for row in rows) for rows in (first, other)]
    assert flat[0] == flat[1]
    assert [int(row.tokens[0]) for row in first] != sorted(flat[0])


@pytest.mark.parametrize(
    ("overlong", "kept", "counts"),
    [("split", 40, {"split": 1}), ("truncate", 16, {"truncated": 1}), ("drop", 0, {"dropped": 1})],
)
def test_overlong_samples_are_treated_as_said_and_counted(overlong, kept, counts):
    source, _ = numbered([[40, 5]])
    with stream_of(source, convert=lambda r: to_document(r, overlong=overlong)) as stream:
        rows = epoch_of(stream)
        stats = stream.stats
    tokens = [t for row in rows for a, b in row.documents for t in row.tokens[a:b].tolist()]
    assert len(tokens) == kept + 5
    epochs = stream.epoch + 1
    assert stats.samples == epochs * 2
    assert {name: getattr(stats, name) // epochs for name in ("split", "truncated", "dropped")} == {
        "split": 0, "truncated": 0, "dropped": 0, **counts
    }  # fmt: skip
    assert stats.tokens == epochs * (kept + 5)


def test_pieces_without_a_label_are_left_out_and_counted():
    """A long prompt, then an answer: of five pieces of 16 tokens only those that hold some of the answer are rows."""
    source, _ = numbered([[80, 5, 66]])

    def answered(record):
        first, length = record.fields["first"], record.fields["length"]
        return to_document(record, trained=lambda t: (t - first >= 40) & (t - first < 48) if length > 16 else t >= 0)

    with stream_of(source, convert=answered) as stream:
        rows = epoch_of(stream)
        epochs, stats = stream.epoch + 1, stream.stats
    assert (stats.split, stats.unlabelled) == (2 * epochs, (4 + 4) * epochs)
    documents = [row.labels[a:b] for row in rows for a, b in row.documents]
    assert len(documents) == 3
    assert all((labels != IGNORE).any() for labels in documents)
    # The first token of a piece is the label of none, so the answer's eight tokens in one piece are eight labels.
    assert sum(row.trained_tokens for row in rows) == 8 + 8 + 4


@settings(max_examples=40, deadline=None)
@given(corpora, st.integers(2, 12), st.integers(0, 25), st.integers(2, 9))
def test_rows_go_on_after_a_resume_where_pieces_are_left_out(shards, seq, stop, every):
    source, _ = numbered(shards)

    def convert(record):  # the first is trained, so that no sample is refused
        first = record.fields["first"]
        return to_document(record, trained=lambda t: (t - first) // 3 % every == 0)

    with stream_of(source, seq=seq, convert=convert) as whole:
        expected, counts = key(whole.take(30)), whole.stats
        assert all((np.array(row[1]) != IGNORE).any() for row in expected)
    with stream_of(source, seq=seq, convert=convert) as first:
        first.take(stop)
        saved = json.loads(json.dumps(first.state_dict()))
    with stream_of(source, seq=seq, convert=convert) as second:
        second.load_state_dict(saved)
        assert key(second.take(30 - stop)) == expected[stop:]
        assert second.stats == counts


def test_remarks_are_counted_with_their_first_places_through_a_resume():
    source, _ = numbered([[16] * 40])

    def convert(record):
        said = (Remark("odd lengths", "message 2"),) if record.fields["first"] % 2 else ()
        return replace(to_document(record, trained=lambda t: t >= 0), remarks=said)

    with stream_of(source, convert=convert) as stream:
        stream.take(30)
        saved = json.loads(json.dumps(stream.state_dict()))
        stream.take(10)
        counted = stream.stats.remarks
    with stream_of(source, convert=convert) as again:
        again.load_state_dict(saved)
        again.take(10)
        assert again.stats.remarks == counted
        (line,) = again.stats.remarks.lines()
    expected = sum(r["first"] % 2 for r in source.parts[0])
    assert line == f"{expected} odd lengths (0:1 message 2, 0:3 message 2, 0:5 message 2, ...)"


def test_remarks_do_not_grow_with_the_corpus():
    """Nor with names out of the data that stand in them."""
    remarks = Remarks()
    for i in range(500):
        remarks += Remarks.of(f"a.jsonl:{i}", [Remark("one kind", f"message {i}"), Remark(f"role 'user{i}'")])
    assert sum(tally.count for tally in remarks.tallies.values()) == 1000
    assert len(remarks.tallies) <= 17
    assert len(json.dumps(remarks.as_json())) < 3000
    assert Remarks.from_json(json.loads(json.dumps(remarks.as_json()))) == remarks


def test_a_truncated_sample_without_an_answer_is_dropped_and_counted():
    source, _ = numbered([[40, 5]])

    def late(record):
        return to_document(record, overlong="truncate", trained=lambda tokens: tokens >= 20)

    with stream_of(source, convert=late) as stream:
        epoch_of(stream)
        assert stream.stats.truncated == 0
        assert stream.stats.dropped == stream.stats.samples // 2


def test_overlong_is_an_error_that_names_five():
    source, _ = numbered([[5, 40, 41], [42, 43, 44], [45, 46]])
    stream = RowStream(source, lambda r: to_document(r, overlong="error"), seq=16, seed=0)
    with pytest.raises(DataError) as caught:
        stream.take(1)
    stream.close()
    message = str(caught.value)
    assert message.count("tokens)") == 5
    assert "2 more" in message
    assert "--overlong split, truncate or drop" in message
    assert "\n" not in message


def test_a_sample_with_nothing_trained_is_an_error_that_names_it():
    source, _ = numbered([[5, 6, 7]])
    # Only the first token of the second document is marked, and nothing comes before it.
    with (
        stream_of(source, convert=lambda r: to_document(r, trained=lambda t: (t == 6) | (t < 5) | (t > 12))) as stream,
        pytest.raises(DataError, match=r"0:1 \(6 tokens\): nothing in it is trained; type another --loss-on"),
    ):
        stream.take(1)


@pytest.mark.parametrize(
    ("asked", "advised"),
    [({}, ("--loss-on (assistant, completion, last, all)",)), ({"loss-on": "last"}, ("(assistant, completion, all)",))]
    + [({"loss-on": "all"}, ("trained; take such samples out",))],
    ids=str,
)
def test_what_was_given_is_not_advised_where_nothing_is_trained(asked, advised):
    source, _ = numbered([[5]])
    nothing = stream_of(source, convert=lambda r: to_document(r, trained=lambda t: t < 0), options=asked)
    with nothing as stream, pytest.raises(DataError) as caught:
        stream.take(1)
    assert all(words in str(caught.value) for words in advised), caught.value


@pytest.mark.parametrize(
    ("overlong", "advised"), [("drop", "(truncate, split)"), ("truncate", "(split)"), ("split", "")]
)
def test_what_was_given_is_not_advised_where_no_label_fits(overlong, advised):
    source, _ = numbered([[40]])
    dropped = stream_of(source, convert=lambda r: to_document(r, overlong="drop"), options={"overlong": overlong})
    with dropped as stream, pytest.raises(DataError) as caught:
        stream.take(1)
    said = str(caught.value)
    assert said.endswith(f"type another --overlong {advised}, or a larger --seq" if advised else "type a larger --seq")


def test_blank_samples_are_left_out_and_counted():
    source, _ = numbered([[5, 0, 6, 0]])
    with stream_of(source) as stream:
        rows = stream.take(1)
        assert rows[0].documents == ((0, 6), (6, 11))
        assert stream.stats.blank == 2


@pytest.mark.parametrize(
    ("shards", "overlong", "says"),
    [
        ([], "split", "has no samples"),
        ([[], []], "split", "has no samples"),
        ([[0, 0]], "split", "of 2, 2 are blank"),
        ([[40, 50], [60]], "drop", "3 longer than a row"),
    ],
)
def test_a_corpus_without_rows_is_an_error_and_never_a_loop(shards, overlong, says):
    source, _ = numbered(shards)
    with (
        stream_of(source, convert=lambda r: to_document(r, overlong=overlong)) as stream,
        pytest.raises(DataError, match=says),
    ):
        stream.take(1)


def test_a_changed_corpus_or_option_is_named():
    source, _ = numbered([[5, 6]])
    with stream_of(source, options={"loss-on": "all"}) as stream:
        stream.take(1)
        saved = stream.state_dict()
    source.fingerprint = "other"
    with (
        stream_of(source, options={"loss-on": "last"}) as stream,
        pytest.raises(DataError, match="corpus was same, is other; loss-on was all, is last; .*--resume never"),
    ):
        stream.load_state_dict(saved)
    with stream_of(source) as stream, pytest.raises(DataError, match="version 0"):
        stream.load_state_dict({**saved, "version": 0})


def test_an_error_ahead_is_raised_when_its_row_is_asked_for():
    source, _ = numbered([[16, 16, 16, 16, 16, 16, 99]])

    def convert(record):
        return to_document(record, overlong="error")

    with stream_of(source, convert=convert) as stream:
        assert len(stream.take(3)) == 3
        for _ in range(2):
            with pytest.raises(DataError, match="longer than a row"):
                stream.take(4)


def test_the_next_window_is_read_ahead():
    source, _ = numbered([[16] * 60])
    with stream_of(source) as stream:
        stream.take(1)
        stream._ahead.result()
        assert 6 <= len(source.reads) <= 12


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 70))
def test_packing_keeps_every_length_and_no_two_bins_could_be_one(lengths, seq):
    bins = best_fit_decreasing(lengths, seq)
    assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in bin) for bin in bins)
    assert all(size <= seq for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > seq


def test_rows_are_well_filled():
    rng = np.random.default_rng(0)
    source, _ = numbered([rng.integers(2, 400, 500).tolist() for _ in range(4)])
    with stream_of(source, seq=1024, window=1 << 15) as stream:
        epoch_of(stream)
        assert stream.fill > 0.98


def test_shards_are_shuffled_anew_each_epoch():
    corpus = Corpus(Listed([[]] * 50), seed=7)
    first, second = corpus.order(0), corpus.order(1)
    assert sorted(first) == sorted(second) == sorted(corpus.shards)
    assert len({first, second, corpus.shards}) == 3
    assert first == Corpus(Listed([[]] * 50), seed=7).order(0)
