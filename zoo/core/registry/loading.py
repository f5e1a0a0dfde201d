"""Which plugins are here and in what state: each is loaded alone, checked at once, and remembered.

One plugin that fails never takes the others down: it is listed as broken, with the reason, and the job goes on
unless it needs what that plugin provides.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pluggy

from zoo.core.contracts.entries import Entry, load_target
from zoo.core.errors import PluginError, did_you_mean, normalised, one_line
from zoo.core.registry import hookspecs
from zoo.core.registry.checks import PluginProblem, gathered_entries, implemented_hooks
from zoo.core.registry.entry_points import Source, file_source, installed_sources
from zoo.version import ZOO_PLUGIN_API

SUPPORTED_APIS = range(1, ZOO_PLUGIN_API + 1)

Resolved = Mapping[str, Any]
"""JSON: `{"plugins": [{"name", "dist", "version", "file", "digest"}, ...], "block": [...]}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginStatus:
    """One plugin: where it comes from, whether it was let in, and what it gave."""

    source: Source
    status: Literal["ok", "blocked", "broken", "skipped"]
    reason: str = ""
    """One line; empty when ok."""
    traceback: str = ""
    api: int | None = None
    """The plugin API it says it was written for."""
    hooks: tuple[str, ...] = ()
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """Kind (`models`, `attention`, ...) to entries."""
    imports_torch: bool = False
    """It made this process import torch when it was loaded, which every command then waits for."""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dist(self) -> str:
        return self.source.dist

    @property
    def version(self) -> str:
        return self.source.version

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def provides(self) -> tuple[str, ...]:
        """`kind:name` of each entry."""
        return tuple(f"{kind}:{entry.name}" for kind, entries in self.entries.items() for entry in entries)


class Plugins:
    """The plugins of one process. Built by `load` or `from_resolved`; there is no global one."""

    def __init__(
        self, manager: pluggy.PluginManager, statuses: Sequence[PluginStatus], *, block: Iterable[str] = ()
    ) -> None:
        self._manager = manager
        self._by_key = {status.source.key: status for status in statuses}
        self.statuses = tuple(statuses)
        self.block = tuple(block)
        self.notes: tuple[str, ...] = ()
        """One line each on what was asked for and is not there."""

    @classmethod
    def load(
        cls,
        block: Collection[str] = (),
        files: Collection[str | Path] = (),
        only: Collection[str] | None = None,
        strict: bool | None = None,
    ) -> Plugins:
        """Load every installed plugin and `files`, but not those that `block` names (plugin or distribution).

        `only` limits the third-party ones; None takes ZOO_PLUGINS (`a,b`; empty for none; unset for all). Built-ins
        leave by `block` only. With `strict` (None takes ZOO_STRICT_PLUGINS) a broken or skipped plugin raises
        PluginError; so does a file that cannot be read.
        """
        only = _names_in("ZOO_PLUGINS") if only is None else only
        strict = os.environ.get("ZOO_STRICT_PLUGINS", "") not in ("", "0") if strict is None else strict
        sources, notes = installed_sources()
        sources += [file_source(path) for path in files]
        plugins = cls._admitting(sources, lambda source: _refusal(source, block, only), block)
        plugins.notes = (*notes, *_absent("--no-plugin", block, sources), *_absent("ZOO_PLUGINS", only or (), sources))
        if strict:
            plugins.refuse_failed(plugins.failed())
        return plugins

    @classmethod
    def from_resolved(cls, resolved: Resolved) -> Plugins:
        """In a worker: load exactly what `resolved` lists. Raises PluginError naming every difference."""
        listed = {_key(row) for row in resolved["plugins"]}
        sources = installed_sources()[0]
        sources += [file_source(row["file"]) for row in resolved["plugins"] if row["file"]]
        refusal = lambda source: "" if source.key in listed else "not loaded by the launcher"  # noqa: E731
        plugins = cls._admitting(sources, refusal, resolved["block"])
        found = differences(resolved, plugins.resolved())
        if found:
            broken = [f"{status.label}: {status.reason}" for status in plugins.failed()]
            raise PluginError(
                f"host {socket.gethostname()} loads other plugins than the launcher: {'; '.join([*found, *broken])}. "
                "Install the same environment on every host"
            )
        return plugins

    @classmethod
    def _admitting(cls, sources: Sequence[Source], refusal: Callable[[Source], str], block: Iterable[str]) -> Plugins:
        manager = pluggy.PluginManager("zoo")
        manager.add_hookspecs(hookspecs)
        statuses = []
        for source in sources:
            reason = refusal(source)
            blocked = PluginStatus(source=source, status="blocked", reason=reason)
            statuses.append(blocked if reason else _admitted(manager, source))
        return cls(manager, statuses, block=block)

    def failed(self) -> list[PluginStatus]:
        """Those that should have been loaded and are not: broken and skipped."""
        return [status for status in self.statuses if status.status in ("broken", "skipped")]

    def refuse_failed(self, failed: Sequence[PluginStatus]) -> None:
        """Raise PluginError for these, if there are any."""
        if failed:
            reasons = "; ".join(f"{status.label}: {status.reason}" for status in failed)
            raise PluginError(f"{len(failed)} plugin(s) cannot be loaded: {reasons}. Next: zoo plugins info NAME")

    def implementations(self, hook: str) -> list[tuple[PluginStatus, Callable[..., Any]]]:
        """Each plugin's implementation, in calling order, taking all of the hook's arguments by keyword.

        Called one by one instead of through pluggy, so that a failure and an answer have an owner.
        """
        found = getattr(self._manager.hook, hook).get_hookimpls()
        return [(self._by_key[impl.plugin_name], _taking_keywords(impl)) for impl in reversed(found)]

    def resolved(self) -> dict[str, Any]:
        """What a worker must load, as JSON (see Resolved)."""
        rows = [_row(status.source) for status in self.statuses if status.ok]
        return {"plugins": rows, "block": list(self.block)}

    def fingerprint(self) -> str:
        """sha256 over sorted (name, distribution, version, digest) of the loaded ones; equal on equal processes."""
        rows = sorted([row["name"], row["dist"], row["version"], row["digest"]] for row in self.resolved()["plugins"])
        digest: str = load_target("hashlib:sha256")(json.dumps(rows).encode()).hexdigest()
        return digest


def differences(theirs: Resolved, ours: Resolved) -> list[str]:
    """One phrase for each plugin that two processes do not share, `ours` being here."""
    there = {_key(row): row for row in theirs["plugins"]}
    here = {_key(row): row for row in ours["plugins"]}
    found = []
    for key in sorted({**there, **here}):
        label = _label({**there, **here}[key])
        if key not in here:
            found.append(f"{label} is not loaded here")
        elif key not in there:
            found.append(f"{label} is loaded here only")
        elif here[key]["version"] != there[key]["version"]:
            found.append(f"{label} is {here[key]['version']} here, {there[key]['version']} there")
        elif here[key]["digest"] != there[key]["digest"]:
            found.append(f"{label} has other content here")
    return found


def _row(source: Source) -> dict[str, str]:
    return {name: getattr(source, name) for name in ("name", "dist", "version", "file", "digest")}


def _key(row: Mapping[str, str]) -> str:
    return Source(name=row["name"], dist=row["dist"], file=row["file"]).key


def _label(row: Mapping[str, str]) -> str:
    return f"{row['name']} ({row['dist'] or row['file']})"


def _names_in(variable: str) -> list[str] | None:
    value = os.environ.get(variable)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _goes_by(source: Source, names: Iterable[str]) -> bool:
    own = {normalised(source.name), normalised(source.dist)}
    return any(normalised(name) in own for name in names)


def _refusal(source: Source, block: Collection[str], only: Collection[str] | None) -> str:
    if _goes_by(source, block):
        return f"blocked by --no-plugin {source.name}"
    if only is not None and not source.builtin and not source.file and not _goes_by(source, only):
        return "not among ZOO_PLUGINS"
    return ""


def _absent(asker: str, names: Iterable[str], sources: Sequence[Source]) -> list[str]:
    known = {name for source in sources for name in (source.name, source.dist) if name}
    missing = [name for name in names if not any(_goes_by(source, [name]) for source in sources)]
    return [
        f"{asker} names '{name}', which is not installed: {did_you_mean(name, known) or 'zoo plugins'}"
        for name in missing
    ]


def _admitted(manager: pluggy.PluginManager, source: Source) -> PluginStatus:
    had_torch = "torch" in sys.modules
    try:
        # stdout is data: what a plugin prints must not end up in somebody's pipe.
        with contextlib.redirect_stdout(sys.stderr):
            return _registered(manager, source, had_torch)
    except KeyboardInterrupt:
        raise
    except PluginProblem as problem:
        return PluginStatus(source=source, status="broken", reason=str(problem))
    except BaseException as error:  # SystemExit too: no plugin may end zoo
        trace = "".join(traceback.format_exception(error))
        return PluginStatus(source=source, status="broken", reason=one_line(error), traceback=trace)


def _registered(manager: pluggy.PluginManager, source: Source, had_torch: bool) -> PluginStatus:
    plugin = source.load()
    api = getattr(plugin, "ZOO_PLUGIN_API", None)
    if api is not None and not isinstance(api, int):
        raise PluginProblem(f"its ZOO_PLUGIN_API is {api!r}: write the number of the API it was made for")
    if api is not None and api not in SUPPORTED_APIS:
        reason = f"needs plugin API {api}, this zoo has {ZOO_PLUGIN_API}: install a release made for it"
        return PluginStatus(source=source, status="skipped", reason=reason, api=api)
    hooks = implemented_hooks(manager, plugin)
    entries = gathered_entries(hooks)
    try:
        manager.register(plugin, name=source.key)
    except BaseException:
        # pluggy may leave a plugin half registered: its name taken, some of its hooks active.
        if manager.has_plugin(source.key):
            manager.unregister(name=source.key)
        raise
    slow = "torch" in sys.modules and not had_torch
    return PluginStatus(source=source, status="ok", api=api, hooks=tuple(hooks), entries=entries, imports_torch=slow)


def _taking_keywords(impl: pluggy.HookImpl) -> Callable[..., Any]:
    return lambda **arguments: impl.function(*(arguments[name] for name in impl.argnames))
