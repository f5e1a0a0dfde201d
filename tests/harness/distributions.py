"""Installed third-party distributions, made of a few files in a temporary folder, as tests want them."""

import importlib
import sys
import textwrap

import pytest

ENTRIES = """
    from zoo import hookimpl
    from zoo import AttentionEntry, CommandEntry, ModelEntry

    @hookimpl
    def zoo_register_attention():
        return [AttentionEntry(name="{name}", target="{name}_kernel:Kernel")]
"""


class Distributions:
    """A folder on sys.path in which `add` puts distributions."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = []

    def add(self, dist, source, *, version="1.0", name=None, value=None):
        """Install a one-module distribution that provides the plugin `name` (default: without the `zoo-`)."""
        name = name or dist.removeprefix("zoo-")
        module = dist.replace("-", "_")
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[zoo]\n{name} = {value or module}\n")
        self.module(module, source)

    def module(self, name, source):
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        self.modules.append(name)
        importlib.invalidate_caches()

    def attention(self, dist, name, **kwargs):
        """Install a distribution that provides one attention backend."""
        self.add(dist, ENTRIES.format(name=name), **kwargs)


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    """Third-party distributions of this test only. Environment variables of zoo are cleared."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    for variable in ("ZOO_PLUGINS", "ZOO_STRICT_PLUGINS", "ZOO_DEBUG", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    made = Distributions(folder)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


def status_of(plugins, name):
    """The one plugin of this name."""
    (found,) = [status for status in plugins.statuses if status.name == name]
    return found
