"""The registry: names, near names, owners, clashes, decisions that are checked, observers that cannot hurt."""

import pytest

from tests.harness.distributions import status_of
from zoo.core.errors import DataError, PluginError, UsageError
from zoo.core.registry.decisions import Observers, Registry
from zoo.core.registry.loading import Plugins

HEAD = "from zoo import *\n"


@pytest.fixture
def registry(distributions):
    """A function from (distribution, source) pairs to the registry with those installed."""

    def build(*sources, **kwargs):
        for dist, source in sources:
            distributions.add(dist, HEAD + source)
        return Registry(Plugins.load(**kwargs))

    return build


def attention(name, target="math:sqrt"):
    entry = f"AttentionEntry(name='{name}', target='{target}')"
    return f"@hookimpl\ndef zoo_register_attention(): return [{entry}]\n"


def test_an_entry_is_found_by_name_with_its_owner(registry):
    found = registry(("zoo-good", attention("good-attn")))
    assert found.attention.get("good-attn").target == "math:sqrt"
    assert found.attention.load("good-attn")(9) == 3
    assert found.owner("attention", "good-attn").label == "good (zoo-good 1.0)"
    assert found.owner("attention", "dense").source.builtin
    assert {"good-attn", "dense", "sdpa"} <= set(found.attention.names())
    assert [entry.name for entry in found.attention] == found.attention.names()
    assert "good-attn" in found.attention
    assert "nobody" not in found.attention


def test_an_unknown_name_gets_the_nearest(registry):
    with pytest.raises(UsageError, match=r"unknown attention backend 'dens': did you mean 'dense'\? \(known: .*dense"):
        registry().attention.get("dens")


def test_an_unknown_name_far_from_all_gets_the_list(registry):
    with pytest.raises(UsageError, match=r"unknown model 'zzz': no name is near \(known: llama3"):
        registry().models.get("zzz")


@pytest.mark.parametrize("method", ["get", "load", "owner"])
def test_two_plugins_with_one_name_clash_only_when_it_is_used(registry, method):
    found = registry(("zoo-one", attention("fast")), ("zoo-two", attention("fast")))
    assert "fast" not in found.attention.names()
    (clash,) = found.clashes()
    assert "given by one (zoo-one 1.0) and two (zoo-two 1.0)" in clash.sentence
    with pytest.raises(PluginError, match=r"one \(zoo-one 1.0\) and two \(zoo-two 1.0\). Block one: --no-plugin two"):
        getattr(found.attention, method)("fast")


def test_blocking_one_of_two_settles_a_clash(registry):
    found = registry(("zoo-one", attention("fast")), ("zoo-two", attention("fast")), block=["two"])
    assert found.owner("attention", "fast").name == "one"
    assert not found.clashes()


def test_a_builtin_name_cannot_be_taken(registry):
    found = registry(("zoo-thief", attention("dense")))
    assert found.owner("attention", "dense").source.builtin
    (clash,) = found.clashes()
    assert clash.sentence == "attention backend 'dense' is zoo's own; the one of thief (zoo-thief 1.0) is passed over"


def test_a_reserved_name_cannot_be_taken(distributions):
    distributions.add(
        "zoo-thief", HEAD + "@hookimpl\ndef zoo_register_commands(): return [CommandEntry(name='plan', target='a:b')]"
    )
    found = Registry(Plugins.load(), reserved={"commands": ["plan"]})
    assert "plan" not in found.commands
    assert "passed over" in found.clashes()[0].sentence


def test_the_same_name_of_another_kind_is_no_clash(registry):
    other = "@hookimpl\ndef zoo_register_trackers(): return [TrackerEntry(name='fast', target='a:b')]\n"
    assert not registry(("zoo-one", attention("fast")), ("zoo-two", other)).clashes()


def test_a_name_that_only_a_broken_plugin_would_give_says_so_by_the_plugins_name(registry):
    found = registry(("zoo-mamba", "import causal_conv1d"))
    with pytest.raises(PluginError) as error:
        found.models.get("mamba")
    assert str(error.value) == (
        "model 'mamba' would come from plugin mamba (zoo-mamba 1.0), which is broken: "
        "ModuleNotFoundError: No module named 'causal_conv1d' (zoo plugins info mamba)"
    )


def test_an_unknown_name_may_be_of_a_plugin_that_is_not_loaded(registry):
    found = registry(("zoo-bundle", "import no_such_module\n" + attention("warp")))
    with pytest.raises(PluginError, match=r"unknown attention backend 'warp'.*not loaded: bundle .*is broken: Module"):
        found.attention.get("warp")
    with pytest.raises(UsageError, match="did you mean 'dense'"):
        found.attention.get("dens")


def test_a_name_of_a_blocked_plugin_says_so(registry):
    found = registry(("zoo-bundle", attention("warp")), block=["bundle"])
    with pytest.raises(
        PluginError, match=r"bundle \(zoo-bundle 1.0\), which is blocked: blocked by --no-plugin bundle"
    ):
        found.attention.get("warp")


def test_a_blocked_builtin_says_so_even_when_installed_editable():
    found = Registry(Plugins.load(block=["dense"], only=[]))
    with pytest.raises(PluginError, match="blocked by --no-plugin dense"):
        found.attention.get("dense")


def test_a_target_that_fails_to_import_names_plugin_and_alternatives(registry):
    found = registry(("zoo-flashy", attention("flashy", target="no_such_module:Kernel")))
    with pytest.raises(PluginError, match=r"'flashy' of plugin flashy \(zoo-flashy 1.0\) cannot be imported.*dense"):
        found.attention.load("flashy")


# Decisions ----------------------------------------------------------------------------------------


def selecting(answer):
    return f"@hookimpl\ndef zoo_select_attention(candidates): return {answer}\n"


def test_the_choice_of_a_plugin_is_taken_and_owned(registry):
    found = registry(("zoo-picky", selecting("candidates[-1]")))
    assert found.select_attention(None, ["dense", "sdpa"]) == "sdpa"
    assert found.decider("zoo_select_attention").name == "picky"


def test_a_plugin_without_an_opinion_leaves_it_to_the_next(registry):
    found = registry(("zoo-one", selecting("candidates[0]")), ("zoo-two", selecting("None")))
    assert found.select_attention(None, ["a", "b"]) == "a"
    assert found.decider("zoo_select_attention").name == "one"


@pytest.mark.parametrize("answer", ["'other'", "3", "['dense']"])
def test_an_answer_outside_the_candidates_is_an_error_that_names_the_plugin(registry, answer):
    found = registry(("zoo-picky", selecting(answer)))
    with pytest.raises(
        PluginError, match=r"plugin picky \(zoo-picky 1.0\) answered .* which is not among: dense, sdpa"
    ):
        found.select_attention(None, ["dense", "sdpa"])


def test_a_decision_that_raises_is_an_error_that_names_the_plugin(registry):
    found = registry(("zoo-picky", selecting("candidates[99]")))
    with pytest.raises(PluginError, match=r"failed in zoo_select_attention: IndexError.*--no-plugin picky"):
        found.select_attention(None, ["dense"])


def test_an_error_for_the_user_passes_unchanged(registry):
    raising = (
        "from zoo.core.errors import DataError\n@hookimpl\ndef zoo_open_data(uri): raise DataError(uri + ' is empty')"
    )
    with pytest.raises(DataError, match=r"^s3://x is empty$"):
        registry(("zoo-s3", raising)).open_data("s3://x")


def test_every_objection_to_a_layout_is_heard(registry):
    objecting = "@hookimpl\ndef zoo_check_layout(layout): return '{}' or None"
    found = registry(
        ("zoo-one", objecting.format("no")),
        ("zoo-two", objecting.format("")),
        ("zoo-three", objecting.format("never")),
        # The families' own objections look into a layout, and there is none.
        block=[status.name for status in Plugins.load(only=[]).statuses if "models" in status.entries],
    )
    assert sorted(found.check_layout(None)) == [("one (zoo-one 1.0)", "no"), ("three (zoo-three 1.0)", "never")]


def test_an_objection_that_is_no_sentence_is_an_error(registry):
    families = [status.name for status in Plugins.load(only=[]).statuses if "models" in status.entries]
    found = registry(("zoo-one", "@hookimpl\ndef zoo_check_layout(layout): return True"), block=families)
    with pytest.raises(PluginError, match="answered zoo_check_layout with True"):
        found.check_layout(None)


def test_the_family_named_for_a_checkpoint_must_exist(registry):
    found = registry(("zoo-one", "@hookimpl\ndef zoo_match_checkpoint(config): return config['x']"))
    assert found.match_checkpoint({"x": "llama3"}) == "llama3"
    with pytest.raises(PluginError, match="answered zoo_match_checkpoint with 'gpt'"):
        found.match_checkpoint({"x": "gpt"})


# Observers ----------------------------------------------------------------------------------------

WATCHING = """
seen = []
@hookimpl
def zoo_step_end(step):
    seen.append(step)
    if step == {fails}: raise {error}
"""


@pytest.mark.parametrize("error", ["ValueError('boo')", "SystemExit(1)"])
def test_an_observer_that_raises_is_told_once_and_disabled_and_the_others_go_on(distributions, capsys, error):
    distributions.add("zoo-bad", HEAD + WATCHING.format(fails=2, error=error))
    distributions.add("zoo-good", HEAD + WATCHING.format(fails=-1, error="None"))
    observers = Observers(Plugins.load(block=["progress"]))
    for step in (1, 2, 3):
        observers.step_end(run=None, step=step, metrics={})
    import zoo_bad
    import zoo_good

    assert zoo_bad.seen == [1, 2]
    assert zoo_good.seen == [1, 2, 3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plugin bad (zoo-bad 1.0) failed in zoo_step_end and watches no more: ")


def test_an_interrupt_passes_through_an_observer(distributions):
    distributions.add("zoo-bad", HEAD + WATCHING.format(fails=1, error="KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        Observers(Plugins.load(block=["progress"])).step_end(run=None, step=1, metrics={})


@pytest.mark.parametrize(
    ("moment", "arguments"),
    [
        ("run_start", {}),
        ("step_end", {"step": 1, "metrics": {"loss": 1.0}}),
        ("checkpoint_saved", {"step": 1, "path": "p"}),
        ("run_error", {"error": ValueError()}),
        ("run_end", {"status": "done"}),
    ],
)
def test_every_moment_reaches_its_hook_with_all_arguments(distributions, moment, arguments):
    names = ", ".join(["run", *arguments])
    distributions.add("zoo-watch", f"{HEAD}seen = []\n@hookimpl\ndef zoo_{moment}({names}): seen.append([{names}])")
    plugins = Plugins.load(block=["progress"])
    getattr(Observers(plugins), moment)(run="run", **arguments)
    import zoo_watch

    assert zoo_watch.seen == [["run", *arguments.values()]]
    assert status_of(plugins, "watch").hooks == (f"zoo_{moment}",)


@pytest.mark.parametrize("name", ["theirs", None, 3])
@pytest.mark.parametrize(
    ("noun", "kind", "entry", "body"),
    [
        ("memory policy", "memory_policies", "MemoryPolicyEntry(name='mine', target='zoo_one:Mine')", ""),
        (
            "parallel adapter",
            "parallel_adapters",
            "ParallelAdapterEntry(name='mine', target='zoo_one:Mine', axes=('tp',))",
            "    axes, phase = ('tp',), Phase.SHARD\n",
        ),
    ],
)
def test_an_object_has_the_name_of_its_entry(registry, noun, kind, entry, body, name):
    base = "ParallelAdapter" if body else "KeepAll"
    source = (
        "from zoo import MemoryPolicyEntry, ParallelAdapter, ParallelAdapterEntry, Phase\n"
        "from zoo.plugins.memory.policies import KeepAll\n"
        f"class Mine({base}):\n    name = {name!r}\n{body}"
        f"@hookimpl\ndef zoo_register_{kind}(): return [{entry}]\n"
    )
    lookup = getattr(registry(("zoo-one", source)), kind)
    with pytest.raises(PluginError, match=f"{noun} 'mine': its name is {name!r}, and the contract says the name of"):
        lookup.make("mine")
    assert "mine" not in lookup.made()
    assert "its name is" in lookup.broken["mine"].sentence
