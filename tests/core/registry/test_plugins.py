"""The loader: what is let in, what is not and why, and that two processes can compare what they loaded."""

import json
import sys

import pluggy
import pytest

from tests.harness.distributions import status_of
from zoo.core.errors import PluginError
from zoo.core.registry.loading import Plugins, differences

GOOD = """
    from zoo import hookimpl
    from zoo import AttentionEntry

    @hookimpl
    def zoo_register_attention():
        return [AttentionEntry(name="good-attn", target="good_kernel:Kernel")]
"""

HEAD = "from zoo import hookimpl\nfrom zoo.core.contracts.entries import AttentionEntry, ModelEntry\n"

BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def (", "SyntaxError: invalid syntax"),
    "misspelled": ("@hookimpl\ndef zoo_register_model(): return []", "did you mean 'zoo_register_models'"),
    "unknown argument": (
        "@hookimpl\ndef zoo_select_attention(problem, layout): return None",
        "unknown argument 'layout': it offers problem, candidates",
    ),
    "near argument": (
        "@hookimpl\ndef zoo_select_attention(problm): return None",
        "unknown argument 'problm': did you mean 'problem'",
    ),
    "default": ("@hookimpl\ndef zoo_step_end(step=0): pass", "gives 'step' a default"),
    "keyword only": ("@hookimpl\ndef zoo_step_end(*, step): pass", "takes step, which is never filled"),
    "catch all": ("@hookimpl\ndef zoo_step_end(**all): pass", "takes **all, which is never filled"),
    "unmarked": ("def zoo_register_models(): return []", "zoo_register_models is not marked"),
    "no hook": ("x = 1", "implements no hook"),
    "wrapper": ("@hookimpl(wrapper=True)\ndef zoo_step_end():\n    yield", "zoo_step_end is a wrapper"),
    "coroutine": ("@hookimpl\nasync def zoo_step_end(): pass", "zoo_step_end is a coroutine"),
    "raises": ("@hookimpl\ndef zoo_register_models(): raise ValueError('no weights')", "ValueError: no weights"),
    "returns nothing": ("@hookimpl\ndef zoo_register_models(): pass", "returned nothing: return a list of ModelEntry"),
    "generator": ("@hookimpl\ndef zoo_register_models(): yield 1", "returned an object of type generator"),
    "strings": ("@hookimpl\ndef zoo_register_attention(): return ['a']", "of type str: it takes AttentionEntry only"),
    "wrong entry": (
        "@hookimpl\ndef zoo_register_models(): return [AttentionEntry(name='a', target='b:c')]",
        "of type AttentionEntry: it takes ModelEntry only",
    ),
    "empty name": (
        "@hookimpl\ndef zoo_register_attention(): return [AttentionEntry(name='', target='b:c')]",
        "an entry named ''",
    ),
    "no target": (
        "@hookimpl\ndef zoo_register_attention(): return [AttentionEntry(name='a', target='b.c')]",
        "target 'b.c': write 'package.module:attribute'",
    ),
    "twice": (
        "@hookimpl\ndef zoo_register_attention(): return [AttentionEntry(name='a', target='b:c')] * 2",
        "two entries named 'a'",
    ),
    "sizes": (
        "@hookimpl\ndef zoo_register_models():"
        " return [ModelEntry(name='m', target='b:c', model_type='m', sizes={'s': {}}, default_size='t')]",
        "no size 't', its default_size",
    ),
    "api of another kind": ("ZOO_PLUGIN_API = [1]\n@hookimpl\ndef zoo_step_end(): pass", "ZOO_PLUGIN_API is [1]"),
    "broken message": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "E",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_remembered_with_its_reason_and_harms_nobody(distributions, case):
    source, reason = BROKEN[case]
    distributions.add("zoo-bad", HEAD + source)
    distributions.add("zoo-good", GOOD)
    plugins = Plugins.load()
    bad = status_of(plugins, "bad")
    assert bad.status == "broken"
    assert reason in bad.reason
    assert "\n" not in bad.reason
    assert not bad.entries
    assert status_of(plugins, "good").provides == ("attention:good-attn",)
    assert status_of(plugins, "dense").ok
    assert not any(status is bad for status, _ in plugins.implementations("zoo_step_end"))


def test_keyboard_interrupt_at_import_is_not_swallowed(distributions):
    distributions.add("zoo-slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Plugins.load()


def test_the_traceback_of_a_broken_plugin_is_kept(distributions):
    distributions.add("zoo-bad", "def deep():\n    raise OSError('disk')\ndeep()")
    assert "in deep" in status_of(Plugins.load(), "bad").traceback


def test_a_plugin_that_pluggy_itself_refuses_is_broken_and_leaves_nothing_behind(distributions, monkeypatch):
    distributions.add("zoo-bad", GOOD)

    registered = pluggy.PluginManager.register

    def half_registered(self, plugin, name=None):
        registered(self, plugin, name)
        if name == "zoo-bad:bad":
            raise pluggy.PluginValidationError(plugin, "no")

    monkeypatch.setattr(pluggy.PluginManager, "register", half_registered)
    plugins = Plugins.load()
    assert status_of(plugins, "bad").status == "broken"
    assert plugins.implementations("zoo_register_attention")
    assert all(status.ok for status, _ in plugins.implementations("zoo_register_attention"))


def test_two_entry_points_that_name_one_module_are_one_plugin_and_one_broken(distributions):
    distributions.add("zoo-good", GOOD)
    info = distributions.folder / "zoo_good-1.0.dist-info" / "entry_points.txt"
    info.write_text("[zoo]\nfirst = zoo_good\nsecond = zoo_good\n")
    plugins = Plugins.load()
    assert status_of(plugins, "first").ok
    assert status_of(plugins, "second").status == "broken"
    assert "already registered" in status_of(plugins, "second").reason


def test_an_instance_can_be_a_plugin(distributions):
    source = """
        from zoo import hookimpl
        class Watcher:
            @hookimpl
            def zoo_step_end(self, step): ...
        watcher = Watcher()
    """
    distributions.add("zoo-watch", source, value="zoo_watch:watcher")
    assert status_of(Plugins.load(), "watch").hooks == ("zoo_step_end",)


def test_a_class_cannot(distributions):
    distributions.add("zoo-watch", "class Watcher: pass", value="zoo_watch:Watcher")
    assert "names the class Watcher" in status_of(Plugins.load(), "watch").reason


def test_what_a_plugin_prints_while_loading_stays_out_of_stdout(distributions, capsys):
    distributions.add("zoo-chatty", f"print('hello')\n{HEAD}@hookimpl\ndef zoo_step_end(): pass")
    assert status_of(Plugins.load(), "chatty").ok
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hello\n"


@pytest.mark.parametrize("name", ["good", "zoo-good", "zoo_good", "ZOO.Good"])
def test_a_plugin_is_blocked_by_its_own_name_or_its_distributions_and_not_imported(distributions, name):
    distributions.add("zoo-good", GOOD)
    plugins = Plugins.load(block=[name])
    assert status_of(plugins, "good").status == "blocked"
    assert "zoo_good" not in sys.modules
    assert plugins.notes == ()


def test_a_builtin_is_blocked_like_any_other():
    plugins = Plugins.load(block=["dense"], only=[])
    assert status_of(plugins, "dense").status == "blocked"


def test_a_blocked_name_that_nobody_has_is_noted(distributions):
    distributions.add("zoo-good", GOOD)
    (note,) = Plugins.load(block=["goood"]).notes
    assert note == "--no-plugin names 'goood', which is not installed: did you mean 'good'?"


@pytest.mark.parametrize(("value", "loaded"), [("", []), ("good", ["good"]), ("zoo-other, good", ["good", "other"])])
def test_zoo_plugins_limits_the_third_party_plugins_only(distributions, monkeypatch, value, loaded):
    distributions.add("zoo-good", GOOD)
    distributions.add("zoo-other", HEAD + "@hookimpl\ndef zoo_step_end(): pass")
    monkeypatch.setenv("ZOO_PLUGINS", value)
    plugins = Plugins.load()
    assert sorted(s.name for s in plugins.statuses if s.ok and not s.source.builtin) == loaded
    assert status_of(plugins, "dense").ok


@pytest.mark.parametrize(("api", "status"), [(1, "ok"), (0, "skipped"), (2, "skipped")])
def test_a_plugin_made_for_another_api_is_skipped(distributions, api, status):
    distributions.add("zoo-good", f"ZOO_PLUGIN_API = {api}\n{HEAD}@hookimpl\ndef zoo_step_end(): pass")
    found = status_of(Plugins.load(), "good")
    assert (found.status, found.api) == (status, api)
    assert found.ok or f"needs plugin API {api}, this zoo has 1" in found.reason


def test_strict_raises_for_the_first_thing_that_is_wrong(distributions, monkeypatch):
    distributions.add("zoo-bad", "import no_such_module")
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"bad \(zoo-bad 1.0\): ModuleNotFoundError"):
        Plugins.load()
    assert status_of(Plugins.load(strict=False), "bad").status == "broken"
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "0")
    Plugins.load()


def test_strict_does_not_mind_what_was_blocked(distributions):
    distributions.add("zoo-bad", "import no_such_module")
    assert Plugins.load(block=["bad"], strict=True)


def test_a_plugin_of_a_newer_zoo_may_mark_a_hook_optional(distributions):
    source = "@hookimpl(optionalhook=True)\ndef zoo_of_tomorrow(x): pass\n@hookimpl\ndef zoo_step_end(): pass"
    distributions.add("zoo-new", HEAD + source)
    assert status_of(Plugins.load(), "new").hooks == ("zoo_step_end",)


def test_one_package_with_unreadable_metadata_hides_no_other(distributions):
    distributions.add("zoo-good", GOOD)
    distributions.add("zoo-mangled", "")
    (distributions.folder / "zoo_mangled-1.0.dist-info" / "entry_points.txt").write_text("[zoo]\nno equals sign\n")
    plugins = Plugins.load()
    assert status_of(plugins, "good").ok
    assert status_of(plugins, "dense").ok
    assert any("zoo-mangled" in note for note in plugins.notes)


def test_third_parties_are_asked_before_builtins_and_arguments_are_opt_in(distributions):
    distributions.add("zoo-picky", HEAD + "@hookimpl\ndef zoo_select_attention(candidates): return candidates[-1]")
    plugins = Plugins.load()
    status, implementation = plugins.implementations("zoo_select_attention")[0]
    assert status.name == "picky"
    assert implementation(problem=None, candidates=["a", "b"]) == "b"


# Files --------------------------------------------------------------------------------------------


FILE = HEAD + (
    "class Kernel: pass\n"
    "@hookimpl\n"
    "def zoo_register_attention(): return [AttentionEntry(name='mine', target=f'{__name__}:Kernel')]\n"
)


def test_a_file_can_be_a_plugin_whose_targets_can_be_imported(distributions, tmp_path):
    place = tmp_path / "my-kernel.py"
    place.write_text(FILE)
    mine = status_of(Plugins.load(files=[place]), "my-kernel")
    assert mine.ok
    assert mine.source.file == str(place)
    assert mine.entries["attention"][0].load().__name__ == "Kernel"


def test_zoo_plugins_does_not_limit_files(distributions, tmp_path, monkeypatch):
    place = tmp_path / "mine.py"
    place.write_text(FILE)
    monkeypatch.setenv("ZOO_PLUGINS", "")
    assert status_of(Plugins.load(files=[place]), "mine").ok


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(PluginError, match=r"nowhere.py: No such file"):
        Plugins.load(files=[tmp_path / "nowhere.py"])


def test_a_file_that_is_no_python_is_broken(distributions, tmp_path):
    place = tmp_path / "mine.txt"
    place.write_text(FILE)
    assert "must end in .py" in status_of(Plugins.load(files=[place]), "mine").reason


# Many processes -----------------------------------------------------------------------------------


def test_a_worker_loads_what_the_launcher_loaded(distributions, tmp_path):
    place = tmp_path / "mine.py"
    place.write_text(FILE)
    distributions.add("zoo-good", GOOD)
    distributions.add("zoo-other", HEAD + "@hookimpl\ndef zoo_step_end(): pass")
    launcher = Plugins.load(files=[place], block=["other"])
    worker = Plugins.from_resolved(json.loads(json.dumps(launcher.resolved())))
    assert [s.source.key for s in worker.statuses if s.ok] == [s.source.key for s in launcher.statuses if s.ok]
    assert status_of(worker, "other").status == "blocked"
    assert worker.fingerprint() == launcher.fingerprint()


def test_a_worker_does_not_load_what_the_launcher_had_not(distributions):
    launcher = Plugins.load()
    distributions.add("zoo-late", GOOD)
    assert status_of(Plugins.from_resolved(launcher.resolved()), "late").status == "blocked"


def test_a_worker_that_cannot_load_a_plugin_says_which_and_why(distributions):
    distributions.add("zoo-good", GOOD)
    resolved = Plugins.load().resolved()
    (distributions.folder / "zoo_good.py").write_text("import no_such_module")
    sys.modules.pop("zoo_good")
    with pytest.raises(
        PluginError, match=r"good \(zoo-good\) is not loaded here; good \(zoo-good 1.0\): ModuleNotFound"
    ):
        Plugins.from_resolved(resolved)


def test_versions_and_contents_make_the_fingerprint(distributions, tmp_path):
    place = tmp_path / "mine.py"
    place.write_text(FILE)
    distributions.add("zoo-good", GOOD)
    before = Plugins.load(files=[place])
    place.write_text(FILE + "# changed\n")
    changed = Plugins.load(files=[place])
    assert len({p.fingerprint() for p in (before, changed, Plugins.load())}) == 3
    assert differences(before.resolved(), changed.resolved()) == [f"mine ({place}) has other content here"]
    rows = before.resolved()
    newer = {**rows, "plugins": [{**r, "version": "2.0"} if r["name"] == "good" else r for r in rows["plugins"]]}
    assert differences(newer, rows) == ["good (zoo-good) is 1.0 here, 2.0 there"]
    assert differences({"plugins": [], "block": []}, {"plugins": rows["plugins"][:1], "block": []}) == [
        f"{rows['plugins'][0]['name']} (zoo) is loaded here only"
    ]
