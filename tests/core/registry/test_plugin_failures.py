"""Whose failure an error is, by the files that its traceback goes through."""

import pytest
import torch.distributed  # noqa: F401  (what a rank that lost its peers has imported)

from tests.harness.distributions import status_of
from zoo.core.errors import DataError, PluginFailed
from zoo.core.registry import failures
from zoo.core.registry.failures import named
from zoo.core.registry.loading import Plugins
from zoo.plugins.attention import dense

HEAD = "import zoo\nfrom zoo import *\nfrom zoo.core.errors import DataError\n"
BROKEN = """
@hookimpl
def zoo_register_attention(): return [AttentionEntry(name="bad", target="zoo_bad:Kernel")]

class Kernel:
    def forward(self, error): raise error
    def call(self, function): function()
"""


@pytest.fixture
def bad(distributions):
    """Plugins with one whose kernel raises what it is given, and that kernel."""
    distributions.add("zoo-bad", HEAD + BROKEN)
    plugins = Plugins.load()
    return plugins, status_of(plugins, "bad").entries["attention"][0].load()()


def raised(call, *arguments):
    """What a call raises, with its traceback."""
    with pytest.raises(BaseException) as caught:
        call(*arguments)
    return caught.value


def test_the_plugin_of_the_innermost_line_is_named_with_the_way_around_it(bad):
    plugins, kernel = bad
    told = named(raised(kernel.forward, ValueError("boo\nmore")), plugins)
    assert type(told) is PluginFailed
    said = str(told)
    assert said.startswith("plugin bad (zoo-bad 1.0) failed in Kernel.forward (zoo_bad.py:9): ValueError: boo. ")
    assert "Go without it: another --attn (" in said
    assert said.endswith("or --no-plugin bad; ZOO_DEBUG=1 shows the traceback")


def test_what_a_library_raises_again_is_followed_to_its_origin(bad):
    plugins, kernel = bad

    def with_cause():
        try:
            kernel.forward(ValueError("boo"))
        except ValueError as error:
            raise RuntimeError("stage 3 failed") from error

    def without():
        try:
            kernel.forward(ValueError("boo"))
        except ValueError:
            raise RuntimeError("stage 3 failed")  # noqa: B904

    for library in (with_cause, without):
        assert "failed in Kernel.forward (zoo_bad.py:9): ValueError: boo" in str(named(raised(library), plugins))


def test_a_builtin_that_fails_inside_a_plugin_is_no_failure_of_the_plugin(bad):
    plugins, kernel = bad
    builtin = {}
    exec(compile("def forward(): raise ValueError('boo')", dense.__file__, "exec"), builtin)
    error = raised(kernel.call, builtin["forward"])
    assert named(error, plugins) is error
    # What zoo or a library raises for it may be what the plugin asked for.
    assert "failed in Kernel.call (zoo_bad.py:10): ValueError" in str(
        named(raised(kernel.call, lambda: int("x")), plugins)
    )


def test_an_error_of_zoo_keeps_kind_text_and_status(bad):
    plugins, kernel = bad

    class Mine(DataError):
        exit_code = 9

    for error in (DataError("dry"), Mine("dry")):
        told = named(raised(kernel.forward, error), plugins)
        assert told.exit_code == error.exit_code
        assert str(told) == "dry (says plugin bad (zoo-bad 1.0))"
    own = raised(kernel.forward, DataError("plugin bad (zoo-bad 1.0) is dry"))
    assert named(own, plugins) is own


def test_a_rank_whose_peer_is_gone_blames_no_plugin(bad):
    plugins, kernel = bad
    error = raised(kernel.forward, RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed"))
    assert named(error, plugins) is error


def test_what_no_plugin_raised_stays(bad):
    plugins, _ = bad
    error = raised(int, "x")
    assert named(error, plugins) is error
    assert named(error, None) is error


def test_files_are_listed_only_where_a_strangers_code_may_have_failed(monkeypatch):
    """To list and resolve those of a distribution takes tens of milliseconds, and an error waits for it."""
    monkeypatch.setattr(failures, "_installed_files", lambda dist: pytest.fail(f"listed {dist}"))
    error = raised(dense.Dense().forward, *[None] * 5)
    assert named(error, Plugins.load()) is error
