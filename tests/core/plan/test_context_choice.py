"""The context scheme of every layer: asked for or chosen by forecast, explained in numbers, refused with reasons."""

import re
from dataclasses import replace

import pytest

from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.errors import PluginError, UsageError
from zoo.core.job.job import Job, LayoutSection
from zoo.core.mesh.degrees import Degrees
from zoo.core.plan.choices import choose_attention
from zoo.core.plan.schemes import choose_schemes, forecasts, load_scheme, rates, settled
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.row_layout import row_layout

HEAD = "from zoo import *\n"
BUILT_IN = ("ring", "allgather", "ulysses", "hybrid", "halo")


@pytest.fixture
def registry(distributions):
    """A function from (distribution, source) pairs to the registry with those installed."""

    def build(*sources, **kwargs):
        for dist, source in sources:
            distributions.add(dist, HEAD + source)
        return Registry(Plugins.load(**kwargs))

    return build


def _job(scheme="auto"):
    return Job().replace("data", seq=4096).replace("layout", cp_scheme=scheme)


def _layout(cp=4, *, windows=None, seq=4096, heads=(8, 2), dtype="bfloat16", scheme="auto", wire=None):
    shape = HeadShape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=64)
    by_layer = [window for window, layers in (windows or {None: 2}).items() for _ in range(layers)]
    facts = ModelFacts(layer_heads=[shape] * len(by_layer), layer_windows=by_layer)
    settings = LayoutSection(cp_scheme=scheme, cp_wire=wire)
    return Layout(degrees=Degrees(cp=cp), seq=seq, settings=settings, dtype=dtype, model=facts)


def _names(schemes):
    return {window: scheme.name for window, scheme in schemes.items()}


def _chosen(registry, scheme, **layout):
    return choose_schemes(registry, _layout(scheme=scheme, **layout))


def test_one_rank_needs_no_scheme(registry):
    assert _chosen(registry(), "auto", cp=1) == ({}, "")
    assert settled(_job("auto"), {}).layout.cp_scheme == "auto"


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_asked_for_is_taken_for_all_layers(registry, name):
    schemes, note = _chosen(registry(), name, windows={None: 2, 64: 3})
    assert _names(schemes) == {None: name, 64: name}
    assert note == f"{name} for 2 layers (asked for) and {name} for 3 layers of window 64 (asked for)"
    schemes, note = _chosen(registry(), name)
    assert (_names(schemes), note) == ({None: name}, f"{name} (asked for)")


def test_two_names_are_for_layers_without_and_with_a_window(registry):
    schemes, note = _chosen(registry(), "ring,halo", windows={None: 1, 64: 3})
    assert _names(schemes) == {None: "ring", 64: "halo"}
    assert note == "ring for 1 layer (asked for) and halo for 3 layers of window 64 (asked for)"
    schemes, _ = _chosen(registry(), "ring, auto", windows={None: 1, 64: 3})
    assert _names(schemes) == {None: "ring", 64: "halo"}
    assert _names(_chosen(registry(), "ring,halo", windows={None: 2})[0]) == {None: "ring"}
    assert _names(_chosen(registry(), "ring,halo", windows={64: 2})[0]) == {64: "halo"}


def test_windows_of_several_sizes_share_one_scheme(registry):
    schemes, note = _chosen(registry(), "auto", windows={None: 1, 4096: 2, 64: 3})
    assert schemes[64] is schemes[4096]
    assert f"and {schemes[64].name} for 5 layers of window 64, 4096 (" in note
    again = settled(_job("auto"), schemes)
    assert _names(_chosen(registry(), again.layout.cp_scheme, windows={None: 1, 4096: 2, 64: 3})[0]) == _names(schemes)


def test_auto_chooses_for_each_window_and_says_with_which_numbers(registry):
    schemes, note = _chosen(registry(), "auto", windows={None: 2, 64: 3}, seq=65536)
    assert schemes[64].name == "halo"
    assert schemes[None].name in BUILT_IN
    plain, windowed = note.split(" and halo for 3 layers of window 64 ")
    assert plain.startswith(f"{schemes[None].name} for 2 layers (chosen by plugin choice ")
    numbers = r"[\d.]+ \w+ \+ [\d.]+ \w+ sent, \d+ % hidden, \d[\w. ]*"
    for sentence, chosen in ((plain, schemes[None].name), (windowed, "halo")):
        assert re.search(f"forecast for a layer and one document: {numbers}", sentence)
        for other in set(BUILT_IN) - {chosen}:
            assert re.search(f"; {other} {numbers}", sentence), (other, sentence)


def test_auto_says_of_those_that_cannot_why(registry):
    schemes, note = _chosen(registry(), "auto", cp=16)
    assert schemes[None].name != "ulysses"
    assert "ulysses cannot: 8 query heads over 2 key/value heads can be dealt out to at most 8 ranks" in note


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("ring:3", ["--cp-scheme ring:3", "takes nothing after its name", "type --cp-scheme ring"]),
        ("ulysses:2", ["--cp-scheme ulysses:2", "takes nothing after its name"]),
        ("hybrid:x", ["--cp-scheme hybrid:x", "size of a group, as hybrid:4"]),
        ("hybrid:", ["--cp-scheme hybrid:", "size of a group, as hybrid:4"]),
        ("hybrid:-2", ["--cp-scheme hybrid:-2", "size of a group"]),
        ("hybrid:3", ["--cp-scheme hybrid:3 with --cp 4", "1, 2 or 4, not 3"]),
        ("hybrid:0", ["--cp-scheme hybrid:0 with --cp 4", "1, 2 or 4, not 0"]),
        ("ring,halo,ring", ["--cp-scheme ring,halo,ring", "or two: without and with a window"]),
        ("rign", ["unknown context scheme 'rign'", "did you mean 'ring'?", "known: allgather, halo"]),
        ("hybird:4", ["unknown context scheme 'hybird'", "did you mean 'hybrid'?"]),
        ("ring,hallo", ["unknown context scheme 'hallo'", "did you mean 'halo'?"]),
        ("", ["unknown context scheme ''"]),
        ("ring,", ["unknown context scheme ''"]),
    ],
)
def test_names_that_mean_nothing_are_refused_in_one_line(registry, scheme, words):
    with pytest.raises(UsageError) as error:
        _chosen(registry(), scheme, windows={None: 1, 64: 1})
    said = str(error.value)
    assert all(word in said for word in words), said
    assert "\n" not in said


@pytest.mark.parametrize("scheme", ["rign", "ring,halo,ring"])
def test_names_are_checked_on_one_rank_too(registry, scheme):
    with pytest.raises(UsageError):
        _chosen(registry(), scheme, cp=1)


def test_too_few_heads_are_refused_with_what_works(registry):
    with pytest.raises(UsageError) as error:
        _chosen(registry(), "ulysses", cp=16)
    assert str(error.value) == (
        "--cp-scheme ulysses with --cp 16: 8 query heads over 2 key/value heads can be dealt out to at most 8 ranks, "
        "not to 16; lower --cp, or type --cp-scheme hybrid"
    )
    with pytest.raises(UsageError, match=r"hybrid:16 with --cp 16: .* name a smaller group, or type --cp-scheme ring"):
        _chosen(registry(), "hybrid:16", cp=16)


SCHEME = """
from zoo.plugins.context.ring import Ring
class Mine(Ring):
    name = "mine"
    def check(self, problem, length, degree): return {reason}
@hookimpl
def zoo_register_context_schemes(): return [ContextSchemeEntry(name="mine", target="zoo_mine:Mine")]
"""
DECIDES = """
@hookimpl
def zoo_select_context_scheme(layout, window, candidates):
    return {answer}
"""


def test_a_plugin_may_decide(registry):
    found = registry(("zoo-mine", SCHEME.format(reason=None) + DECIDES.format(answer="'mine' if window else None")))
    schemes, note = _chosen(found, "auto", windows={None: 1, 64: 1})
    assert schemes[64].name == "mine"
    assert schemes[None].name != "mine"
    assert "mine for 1 layer of window 64 (chosen by plugin mine (zoo-mine 1.0); forecast for a layer" in note
    assert "(chosen by plugin choice (zoo" in note
    assert _names(_chosen(found, "mine")[0]) == {None: "mine"}


def test_a_plugin_cannot_decide_for_what_cannot_run(registry):
    found = registry(("zoo-mine", SCHEME.format(reason="'not today'") + DECIDES.format(answer="'mine'")))
    with pytest.raises(PluginError, match=r"mine \(zoo-mine 1.0\) answered zoo_select_context_scheme with 'mine'"):
        _chosen(found, "auto")
    with pytest.raises(UsageError, match="--cp-scheme mine with --cp 4: not today"):
        _chosen(found, "mine")


def test_without_anybody_to_decide_the_fastest_is_taken(registry):
    found = registry(block=["choice"])
    schemes, note = _chosen(found, "auto", windows={None: 1, 64: 1}, seq=65536)
    costs = forecasts(
        {name: load_scheme(found, name) for name in BUILT_IN},
        _layout(windows={None: 1, 64: 1}, seq=65536),
        Mask.whole(65536),
    )
    assert schemes[None].name == min(costs, key=lambda name: costs[name].seconds)
    assert "chosen by plugin" not in note


def test_without_any_scheme_that_can_the_first_reason_is_given(registry):
    blocked = ["ring", "allgather", "hybrid", "halo"]
    with pytest.raises(UsageError, match="at most 8 ranks, not to 16; lower --cp"):
        _chosen(registry(block=blocked), "auto", cp=16)
    with pytest.raises(UsageError, match="--cp 4 needs a context scheme and no plugin provides one; see `zoo plugins`"):
        _chosen(registry(block=[*blocked, "ulysses"]), "auto")


@pytest.mark.parametrize(
    ("asked", "windows", "written"),
    [
        ("ring", {None: 2}, "ring"),
        ("ring,halo", {None: 2, 64: 2}, "ring,halo"),
        ("ring,halo", {64: 2}, "halo"),
        ("ring,ring", {None: 2, 64: 2}, "ring"),
        ("hybrid:2", {None: 2}, "hybrid:2"),
        ("hybrid:2,halo", {None: 2, 64: 2}, "hybrid:2,halo"),
        ("auto", {None: 2, 64: 2}, None),
        ("auto", {64: 2}, None),
    ],
)
def test_what_was_chosen_is_written_so_that_it_is_chosen_again(registry, asked, windows, written):
    found = registry()
    schemes, _ = _chosen(found, asked, windows=windows)
    job = settled(_job(asked), schemes)
    assert written is None or job.layout.cp_scheme == written
    assert "auto" not in job.layout.cp_scheme
    again, _ = choose_schemes(found, _layout(scheme=Job.from_plain(job.settings()).layout.cp_scheme, windows=windows))
    assert _names(again) == _names(schemes)
    assert settled(job, again) == job


def test_forecasts_are_of_the_layout_that_rows_will_have(registry):
    """A layer's window changes what it computes, not how the row of all layers is cut."""
    layouts, windows = [], {None: 2, 64: 2}

    class Spy(type(load_scheme(registry(), "ring"))):
        def plan(self, mask, layout, rank, heads):
            layouts.append((mask.window, layout))
            return super().plan(mask, layout, rank, heads)

    for window in windows:
        mask = Mask.whole(4096, window=window)
        forecasts({"spy": Spy()}, _layout(windows=windows), mask)
    assert {window for window, _ in layouts} == {None, 64}
    assert {layout for _, layout in layouts} == {row_layout(Mask.whole(4096), windows, 4)}


def test_forecasts_count_types_on_the_wire(registry):
    schemes = {name: load_scheme(registry(), name) for name in BUILT_IN}
    mask, layouts = Mask.whole(4096), [_layout(dtype="float32", wire=wire) for wire in (None, "bfloat16")]
    wide, narrow = (forecasts(schemes, layout, mask) for layout in layouts)
    for name in BUILT_IN:
        assert [2 * sent for sent in narrow[name].sent] == list(wide[name].sent)


@pytest.mark.parametrize(
    ("dtype", "wire", "value", "gradient"),
    [
        ("float64", None, 8, 8),
        ("float32", None, 4, 4),
        ("bfloat16", None, 2, 4),
        ("bfloat16", "bfloat16", 2, 2),
        ("float32", "bfloat16", 2, 2),
        ("float64", "float32", 4, 4),
        ("bfloat16", "float32", 2, 4),
    ],
)
def test_numbers_travel_in_their_own_type_or_a_narrower_one(dtype, wire, value, gradient):
    found = rates(_layout(dtype=dtype).problems[0], 4, wire)
    assert (found.value_bytes, found.gradient_bytes) == (value, gradient)
    assert found.flops > 0
    assert found.link > 0


def test_a_mask_that_shows_everything_is_forecast_as_such(registry):
    causal, full = (choose_schemes(registry(), _layout(), mask)[1] for mask in ("causal", "full"))
    assert causal != full


def test_more_ranks_than_tokens_is_the_adapters_to_refuse(registry):
    assert set(_names(_chosen(registry(), "auto", cp=8, seq=5)[0])) == {None}


def test_a_scheme_must_carry_the_heads_of_every_layer(registry):
    """One K/V head cannot be dealt out over ranks by a scheme that says so, whatever other layers have."""
    picky = (
        "from zoo.plugins.context.ring import Ring\n"
        "class Picky(Ring):\n    name = 'picky'\n"
        "    def check(self, problem, length, degree): return 'one K/V head' if problem.num_kv_heads == 1 else None\n"
        "@hookimpl\ndef zoo_register_context_schemes():\n"
        "    return [ContextSchemeEntry(name='picky', target='zoo_picky:Picky')]\n"
    )
    found, alike = registry(("zoo-picky", picky)), _layout(scheme="picky")
    assert _names(choose_schemes(found, alike)[0]) == {None: "picky"}
    few, many = HeadShape(num_heads=8, num_kv_heads=1, head_dim=64), alike.problems[0].heads
    mixed = replace(alike, model=replace(alike.model, layer_heads=[many, many, few]))
    assert [problem.num_kv_heads for problem in mixed.problems] == [2, 1]
    with pytest.raises(UsageError, match="one K/V head"):
        choose_schemes(found, mixed)
    mixed = replace(mixed, settings=LayoutSection())
    assert "picky cannot: one K/V head" in choose_schemes(found, mixed)[1]


def test_a_kernel_must_compute_the_heads_of_every_layer(registry):
    picky = (
        "class Picky:\n    name = 'picky'\n    forward = backward = None\n"
        "    def supports(self, problem): return 'odd heads' if problem.num_kv_heads == 1 else None\n"
        "@hookimpl\ndef zoo_register_attention(): return [AttentionEntry(name='picky', target='zoo_picky:Picky')]\n"
    )
    found = registry(("zoo-picky", picky), block=["dense", "sdpa", "flash", "flex"])
    problem = _layout().problems[0]
    one = problem.of(HeadShape(num_heads=8, num_kv_heads=1, head_dim=64))
    job = Job().replace("attention", backend="picky")
    assert choose_attention(job, found, [problem])[0].name == "picky"
    for wanted in (job, Job()):
        with pytest.raises(UsageError, match="odd heads"):
            choose_attention(wanted, found, [problem, one])
