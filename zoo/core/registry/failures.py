"""Whose failure an error is: the innermost frame in the files of a plugin says which plugin raised it, and where.

Looked for where an error ends a command or a rank, so no object of a plugin is wrapped and no call costs more.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import NamedTuple

from zoo.core.contracts.entries import load_target
from zoo.core.errors import PluginFailed, ZooError, error_of, one_line
from zoo.core.machine.launcher_env import said_rank
from zoo.core.registry.catalog import KINDS, Catalog
from zoo.core.registry.loading import Plugins, PluginStatus

_ZOO = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep


@contextlib.contextmanager
def plugins_named(plugins: Plugins | None) -> Iterator[None]:
    """Inside `with`, raise `named` of what is raised, but for what asks to stop."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too: no plugin may end zoo
        told = named(error, plugins)
        if told is error:
            raise
        raise told from error


def named(error: BaseException, plugins: Plugins | None) -> BaseException:
    """Return an error that names the plugin that raised it; the error itself if none did.

    What a plugin says in an error of zoo keeps its kind, text and status. Anything else becomes PluginFailed.
    """
    if plugins is None or isinstance(error, PluginFailed):
        return error
    owners = _Owners(plugins)
    if isinstance(error, ZooError):
        raised_in = owners.of(_frames(error)[-1:])
        # Built-ins speak for zoo.
        if raised_in is None or raised_in.status.source.builtin or raised_in.status.label in str(error):
            return error
        said = f"{error} (says plugin {raised_in.status.label})"
        return error_of(type(error).__name__, error.exit_code, said)
    origins = _origins(error)
    if any(_lost_touch(origin) for origin in origins):
        return error  # another rank ended first, and knows why
    for origin in origins:
        found = owners.of(_frames(origin))
        if found is not None:
            return error if found.status.source.builtin else PluginFailed(_sentence(found, origin, plugins, owners))
    return error


class _Place(NamedTuple):
    """A line that was being run."""

    frame: FrameType
    line: int

    @property
    def file(self) -> str:
        return os.path.realpath(self.frame.f_code.co_filename)

    @property
    def module(self) -> str:
        return str(self.frame.f_globals.get("__name__", ""))

    @property
    def function(self) -> str:
        """As `Kernel.forward`, wherever the class was made."""
        return str(self.frame.f_code.co_qualname).rpartition("<locals>.")[2]


class _Found(NamedTuple):
    status: PluginStatus
    place: _Place


class _Owners:
    """Which plugin a file belongs to."""

    def __init__(self, plugins: Plugins) -> None:
        self._statuses = [status for status in plugins.statuses if status.ok]
        self._installed: dict[str, frozenset[str]] = {}
        """Files of distributions that were asked about: to list those of one takes tens of milliseconds."""

    def of(self, places: Sequence[_Place]) -> _Found | None:
        """Return the innermost of some places that is in the files of a plugin, and the plugin."""
        for place in reversed(places):
            # Plugins of one package share its folder: the one that names the module comes first.
            ranks = [(self._rank(status, place), status) for status in self._statuses]
            best, status = max(ranks, key=lambda rank: rank[0], default=(0, None))
            if best and status is not None:
                return _Found(status, place)
        return None

    def _rank(self, status: PluginStatus, place: _Place) -> int:
        """Return how surely a place belongs to a plugin; 0 if it does not."""
        source = status.source
        if source.file:
            return 3 * (os.path.realpath(source.file) == place.file)
        own = source.value.partition(":")[0]
        targets = [entry.target.partition(":")[0] for entries in status.entries.values() for entry in entries]
        # The families share `zoo.models.common`, and what fails there is of zoo.
        if place.module in (own, *targets):
            return 3
        if place.file.startswith(_folder(own, whole=not source.builtin)):
            return 2
        return int(not source.builtin and place.file in self._files_of(source.dist))

    def _files_of(self, dist: str) -> frozenset[str]:
        if dist not in self._installed:
            self._installed[dist] = _installed_files(dist)
        return self._installed[dist]


def _folder(module: str, *, whole: bool) -> str:
    """Return the folder of a module, of its outermost package if `whole`; else its file, if it is in no package."""
    names = module.split(".")
    packages = [".".join(names[: i + 1]) for i in range(len(names))]
    for name in packages if whole else reversed(packages[:-1]):
        file: str | None = getattr(sys.modules.get(name), "__file__", None)
        if file:  # none of a namespace, which other distributions share
            found = os.path.realpath(file)
            return os.path.dirname(found) + os.sep if hasattr(sys.modules[name], "__path__") else found
    return os.sep + os.devnull


def _installed_files(dist: str) -> frozenset[str]:
    try:
        files = metadata.distribution(dist).files or ()
        return frozenset(os.path.realpath(str(file.locate())) for file in files if file.suffix == ".py")
    except Exception:  # metadata that cannot be read must not hide the error that is told
        return frozenset()


def _frames(error: BaseException) -> list[_Place]:
    """Return the lines that led to an error, the outermost first."""
    return [_Place(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def _origins(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the first cause first.

    torch raises again what a stage, a backward or a block that is computed again raised, mostly as its cause.
    """
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and all(following is not seen for seen in found):
        found.append(following)
        frames = _frames(following)
        # What zoo raises while it handles another error is an error of its own.
        foreign = bool(frames) and not frames[-1].file.startswith(_ZOO)
        context = following.__context__ if foreign and not following.__suppress_context__ else None
        following = following.__cause__ or context
    return found[::-1]


def _lost_touch(error: BaseException) -> bool:
    return "torch.distributed" in sys.modules and bool(load_target("zoo.core.launch.process_group:lost_touch")(error))


def _sentence(found: _Found, error: BaseException, plugins: Plugins, owners: _Owners) -> str:
    status, place = found
    where = "its import" if place.function == "<module>" else place.function
    rank = f" on rank {said_rank()}" if said_rank() else ""
    said = f"plugin {status.label} failed in {where} ({os.path.basename(place.file)}:{place.line}){rank}"
    own = [p for p in _frames(error) if (owner := owners.of([p])) is not None and owner.status is status]
    ways = [*_others(status, own, plugins), f"--no-plugin {status.name}"]
    return f"{said}: {one_line(error)}. Go without it: {', or '.join(ways)}; ZOO_DEBUG=1 shows the traceback"


def _others(status: PluginStatus, places: Sequence[_Place], plugins: Plugins) -> list[str]:
    """Return what to choose instead of the entry that failed."""
    ways = []
    for kind in _kinds(status, places):
        own = {entry.name for entry in status.entries[kind]}
        others = [name for name in Catalog(kind, plugins).names() if name not in own]
        if KINDS[kind].option and others:
            ways.append(f"another {KINDS[kind].option} ({', '.join(others)})")
    return ways


def _kinds(status: PluginStatus, places: Sequence[_Place]) -> list[str]:
    """Return the kind of the entry that was running: by its class, else by its module, else all that a plugin has."""
    running = {f"{place.module}:{place.function.partition('.')[0]}" for place in places}
    modules = {place.module for place in places}
    targets = [(kind, entry.target) for kind, entries in status.entries.items() for entry in entries]
    exact = [kind for kind, target in targets if target in running]
    near = [kind for kind, target in targets if target.partition(":")[0] in modules]
    return list(dict.fromkeys(exact or near or status.entries))
