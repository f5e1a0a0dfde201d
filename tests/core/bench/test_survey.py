"""Figures of schemes from their plans: formulas, counts by hand, and masks from words."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given

from tests.core.attention.draw import layouts, masks, patient, positions, visible
from zoo.core.attention.forecast import Rates
from zoo.core.bench import measure
from zoo.core.bench.figures import layer_flops, remote_rows, survey
from zoo.core.bench.mask_text import MaskWords
from zoo.core.contracts.attention import HeadShape
from zoo.core.errors import DataError, UsageError
from zoo.core.plan.schemes import load_scheme
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.mask import Mask

HEADS = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
RATES = Rates(flops=500e12, link=450e9, value_bytes=2, gradient_bytes=4)
LENGTH = 4096
MASKS = {
    "causal": Mask.whole(LENGTH),
    "full": Mask.whole(LENGTH, causal=False),
    "window": Mask.whole(LENGTH, window=300),
    "documents": MaskWords.parse("documents:200").mask(LENGTH, seed=3),
    "prefix": MaskWords.parse("documents:1k+prefix:100").mask(LENGTH, seed=3),
    "nothing": Mask(LENGTH, ()),
}


@pytest.fixture(scope="module")
def schemes():
    registry = Registry(Plugins.load())
    return {name: load_scheme(registry, name) for name in registry.context_schemes.names()}


@given(masks().flatmap(lambda mask: layouts(mask.length).map(lambda layout: (mask, layout))))
@patient
def test_remote_rows_are_those_of_the_definition(drawn):
    mask, layout = drawn
    owner = {row: rank for rank, chunks in enumerate(layout.chunks) for row in positions(chunks)}
    read = {(owner[q], k) for q, k in visible(mask) if owner[q] != owner[k]}
    assert remote_rows(mask, layout) == (len({k for _, k in read}), len(read))


@pytest.mark.parametrize("name", MASKS)
def test_every_scheme_computes_what_the_mask_shows_and_sends_no_less_than_the_bound(schemes, name):
    mask = MASKS[name]
    for scheme in schemes.values():
        figures = survey(scheme, mask, 8, HEADS, RATES)
        assert figures.executed == figures.minimal == mask.area * 32
        assert figures.excess == 1
        if scheme.name in ("ring", "allgather", "halo"):
            for way in (figures.forward, figures.backward):
                assert way.bound <= way.needed <= way.total <= 8 * way.busiest
        if scheme.name in ("allgather", "halo"):
            assert figures.forward.total == figures.forward.needed
            assert figures.backward.total == figures.backward.needed


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_the_causal_ring_has_its_formulas(schemes, degree):
    figures = survey(schemes["ring"], Mask.whole(LENGTH), degree, HEADS, RATES)
    kv = 2 * (LENGTH // degree) * 8 * 128 * 2
    assert figures.layout == "head-tail"
    assert figures.imbalance == 1
    assert figures.forward.total == 0.75 * degree * (degree - 1) * kv
    assert figures.forward.busiest <= (degree - 1) * kv
    assert figures.forward.bound == (degree - 0.5) * kv  # all rows but the tail of rank 0, which only it sees
    assert figures.backward.bound == 3 * figures.forward.bound  # a gradient row has twice the bytes
    contiguous = survey(schemes["ring"], Mask.whole(LENGTH), degree, HEADS, RATES, balance="contiguous")
    assert contiguous.layout == "contiguous"
    assert contiguous.imbalance == pytest.approx((2 * degree - 1) / degree, rel=1e-3)


def test_ulysses_sends_queries_keys_and_results(schemes):
    figures = survey(schemes["ulysses"], Mask.whole(LENGTH), 8, HEADS, RATES)
    rows = LENGTH // 8 * 128 * 2 * 7 / 8
    assert figures.forward.busiest == rows * (2 * 32 + 2 * 8)
    assert figures.forecast.hidden == 0
    assert figures.imbalance == 1


def test_predicted_time_is_work_over_rate_when_links_are_fast(schemes):
    fast = Rates(flops=1e9, link=1e30, value_bytes=2, gradient_bytes=4)
    figures = survey(schemes["ring"], Mask.whole(LENGTH), 8, HEADS, fast)
    assert figures.forecast.seconds == pytest.approx(layer_flops(figures.executed, HEADS) / 8 / 1e9)
    # The last gradients come home when nothing is left to compute.
    assert 0.9 < figures.forecast.hidden < 1
    slow = Rates(flops=1e12, link=1e8, value_bytes=2, gradient_bytes=4)
    slowed = survey(schemes["ring"], Mask.whole(LENGTH), 8, HEADS, slow).forecast
    assert slowed.hidden < 0.5
    assert slowed.seconds > 2 * slowed.compute_seconds


def test_layouts_have_names(schemes):
    assert survey(schemes["ring"], MASKS["documents"], 8, HEADS, RATES).layout.startswith("balanced/")
    assert survey(schemes["ulysses"], MASKS["documents"], 8, HEADS, RATES).layout == "contiguous"


def test_a_row_is_measured_as_long_as_patience_allows(monkeypatch):
    monkeypatch.setattr(measure, "attention_flops", lambda _dtype, _ranks: 1e9)
    monkeypatch.setattr(measure, "memory_bytes", lambda: 1 << 60)
    heads = HeadShape(num_heads=1, num_kv_heads=1, head_dim=1)
    found = measure.affordable_length(Mask.whole, 1 << 20, heads, "float32", 2)
    assert 14 * Mask.whole(found).area <= 2e9 * measure.PATIENCE < 14 * Mask.whole(2 * found).area
    assert measure.affordable_length(Mask.whole, 3000, heads, "float32", 2) == 3000
    monkeypatch.setattr(measure, "memory_bytes", lambda: 2 * 12 * 5 * 4096)
    assert measure.affordable_length(Mask.whole, 1 << 20, heads, "float32", 2) == 4096
    monkeypatch.setattr(measure, "memory_bytes", lambda: 0)
    assert measure.affordable_length(Mask.whole, 1 << 20, heads, "float32", 2) == measure.SHORTEST


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_trial_travels_as_json(mask):
    trial = measure.Trial(mask=mask, heads=HEADS, schemes=("ring", "hybrid:2"), backend="sdpa", dtype="float32")
    assert measure.Trial.from_plain(json.loads(json.dumps(asdict(trial)))) == trial


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("causal", Mask.whole(100)),
        ("full", Mask.whole(100, causal=False)),
        ("window:7", Mask.whole(100, window=7)),
        ("window:1k", Mask.whole(100, window=1024)),
        ("prefix:30", Mask(100, ((0, 100),), prefixes=(30,))),
        ("prefix:1k + causal", Mask(100, ((0, 100),), prefixes=(100,))),
    ],
)
def test_words_are_masks(text, mask):
    assert MaskWords.parse(text).mask(100) == mask


def test_drawn_documents_fill_the_row_with_the_mean_that_was_asked_for():
    words = MaskWords.parse("documents:2k+window:512")
    mask = words.mask(1 << 22, seed=1)
    sizes = [stop - start for start, stop in mask.documents]
    assert sum(sizes) == mask.length
    assert 1800 < sum(sizes) / len(sizes) < 2300
    assert max(sizes) > 6 * 2048
    assert mask.window == 512
    assert words.mask(1 << 22, seed=1) == mask != words.mask(1 << 22, seed=2)
    assert MaskWords.parse("full+documents:2k").mask(1 << 22, seed=1).documents == mask.documents


def test_documents_of_a_file_repeat_and_are_cut_at_the_end(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("3\n5\n")
    assert MaskWords.parse(f"documents:{file}").mask(12).documents == ((0, 3), (3, 8), (8, 11), (11, 12))


@pytest.mark.parametrize("text", ["0\n", "3 x", "", "-2"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    with pytest.raises(DataError, match="one whole number of tokens a line"):
        MaskWords.parse(f"documents:{file}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("casual", "did you mean 'causal'"),
        ("window", "no mask"),
        ("causal:3", "no mask"),
        ("window:x", "not a number of tokens"),
        ("window:0", "not a number of tokens"),
        ("full+window:8", "full shows everything"),
        ("causal+full", "contradicts"),
        ("window:8+prefix:4", "cannot be combined"),
        ("documents:5+documents:6", "contradicts"),
        ("", "no mask"),
    ],
)
def test_words_that_are_no_mask_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        MaskWords.parse(text)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="FileNotFoundError"):
        MaskWords.parse("documents:nowhere.txt")
