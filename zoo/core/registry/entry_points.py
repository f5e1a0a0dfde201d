"""Where plugins come from: entry points of the group `zoo` in installed distributions, and single files."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from zoo.core.contracts.entries import load_target
from zoo.core.errors import PluginError

GROUP = "zoo"
BUILTIN_DIST = "zoo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A plugin that could be loaded; nothing of it has been imported."""

    name: str
    dist: str = ""
    """The distribution it was installed by; empty for a file."""
    version: str = ""
    value: str = ""
    """The entry point's `module` or `module:attribute`."""
    file: str = ""
    """Absolute path of an unpackaged plugin; empty for an installed one."""
    digest: str = ""
    """sha256 of that file, which stands for the version it does not have."""

    @property
    def key(self) -> str:
        """Unique among all sources."""
        return f"{self.dist or self.file}:{self.name}"

    @property
    def builtin(self) -> bool:
        return self.dist == BUILTIN_DIST

    @property
    def label(self) -> str:
        """As errors name it: `ring (zoo-ring 0.2.1)`."""
        return f"{self.name} ({self.file or f'{self.dist} {self.version}'.strip()})"

    def load(self) -> object:
        """Import it and return the plugin object. Raises whatever the import raises."""
        if self.file:
            return _load_file(self)
        return metadata.EntryPoint(name=self.name, value=self.value, group=GROUP).load()


def installed_sources() -> tuple[list[Source], list[str]]:
    """The entry points of the group `zoo`, built-ins first, then by name; and notes on metadata that cannot be read."""
    entry_points, notes = _entry_points()
    facts: dict[int, tuple[str, str]] = {}
    found = []
    for point in entry_points:
        dist, version = facts.setdefault(id(point.dist), _facts(point.dist))
        found.append(Source(name=point.name, dist=dist, version=version, value=point.value))
    unique = {source.key: source for source in found}
    return sorted(unique.values(), key=lambda source: (not source.builtin, source.name, source.dist)), notes


def _facts(dist: metadata.Distribution | None) -> tuple[str, str]:
    if dist is None:
        return "unknown", ""
    fields = dist.metadata
    return fields["Name"] or "unknown", fields["Version"] or ""


def _entry_points() -> tuple[list[metadata.EntryPoint], list[str]]:
    try:
        return list(metadata.entry_points(group=GROUP)), []
    except Exception:  # one package with unreadable metadata must not hide all the others
        found: list[metadata.EntryPoint] = []
        notes: list[str] = []
        for dist in metadata.distributions():
            try:
                found += dist.entry_points.select(group=GROUP)
            except Exception as error:
                notes.append(f"the entry points of {_facts(dist)[0]} cannot be read: {type(error).__name__}: {error}")
        return found, notes


def file_source(path: str | Path) -> Source:
    """An unpackaged plugin. Raises PluginError if the file cannot be read."""
    place = Path(path).expanduser().resolve()
    try:
        content = place.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PluginError(
            f"--plugin {path}: {reason}. Give the path of a Python file with @zoo.hookimpl hooks"
        ) from error
    return Source(name=place.stem, file=str(place), digest=load_target("hashlib:sha256")(content).hexdigest())


def _load_file(source: Source) -> object:
    # The module stays importable under a name that is the same in every process, for the targets of its entries.
    stem = re.sub(r"\W", "_", source.name)
    name = f"zoo_plugin_{stem}_{source.digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, source.file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source.file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
