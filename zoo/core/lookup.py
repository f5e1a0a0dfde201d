"""The entries of one kind, by name: whose they are, what clashes, and who would have had a name that is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from zoo.core.entries import Entry
from zoo.core.errors import PluginError, UsageError, ZooError, one_line
from zoo.core.plugins import Plugins, PluginStatus
from zoo.core.suggest import did_you_mean, normalised

E = TypeVar("E", bound=Entry)

_NOUNS = {
    "models": "model",
    "attention": "attention backend",
    "context_schemes": "context scheme",
    "parallel_adapters": "parallel adapter",
    "memory_policies": "memory policy",
    "converters": "checkpoint format",
    "data_formats": "data format",
    "trackers": "tracker",
    "commands": "command",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """A name that more than one plugin gives, or that zoo itself has taken."""

    kind: str
    name: str
    claimants: tuple[PluginStatus, ...]
    winner: PluginStatus | None
    """None when the name cannot be used by anyone; otherwise, or if `by_zoo`, the others are passed over."""
    by_zoo: bool = False

    @property
    def noun(self) -> str:
        """What one entry of this kind is called."""
        return _NOUNS[self.kind]

    @property
    def sentence(self) -> str:
        claimed = " and ".join(status.label for status in self.claimants)
        if self.winner or self.by_zoo:
            return f"{self.noun} '{self.name}' is zoo's own; the one of {claimed} is passed over"
        return f"{self.noun} '{self.name}' is given by {claimed}; using it is an error until one is blocked"


class Lookup(Generic[E]):
    """Entries of one kind. `get` and `load` raise the error a user can act on; iteration gives what can be used."""

    def __init__(self, kind: str, plugins: Plugins, *, reserved: Collection[str] = ()) -> None:
        self.kind = kind
        self.noun = _NOUNS[kind]
        """What one entry is called in messages."""
        self._plugins = plugins
        self._reserved = frozenset(reserved)
        self._claims: dict[str, list[tuple[PluginStatus, E]]] = {}
        for status in plugins.statuses:
            for entry in status.entries.get(kind, ()):
                self._claims.setdefault(entry.name, []).append((status, cast(E, entry)))

    def __iter__(self) -> Iterator[E]:
        return (self._claims[name][0][1] for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        """Names that can be used, sorted."""
        return sorted(name for name in self._claims if self._winner(name) is not None)

    def get(self, name: str) -> E:
        """The entry. Raises UsageError for an unknown name, PluginError for a clash or a plugin that is not loaded."""
        return self._owned(name)[1]

    def owner(self, name: str) -> PluginStatus:
        """The plugin that gives it. Raises as `get` does."""
        return self._owned(name)[0]

    def load(self, name: str) -> Any:
        """Import the target of an entry. Raises as `get` does, and PluginError if the import fails."""
        owner, entry = self._owned(name)
        try:
            return entry.load()
        except (KeyboardInterrupt, ZooError):
            raise
        except BaseException as error:  # SystemExit too: no plugin may end zoo
            raise PluginError(
                f"{self.noun} '{name}' of plugin {owner.label} cannot be imported: {one_line(error)}. "
                f"Repair it, or choose another: {', '.join(other for other in self.names() if other != name) or 'none'}"
            ) from error

    def clashes(self) -> list[Clash]:
        """Names with more than one claimant, sorted."""
        found = [self._clash(name) for name in sorted(self._claims)]
        return [clash for clash in found if clash]

    def _clash(self, name: str) -> Clash | None:
        claimants = [status for status, _ in self._claims[name]]
        if name in self._reserved:
            return Clash(kind=self.kind, name=name, claimants=tuple(claimants), winner=None, by_zoo=True)
        if len(claimants) == 1:
            return None
        # Built-ins are loaded first and their names are unique, so a built-in claimant is the first.
        winner = claimants[0] if claimants[0].source.builtin else None
        others = claimants[1:] if winner else claimants
        return Clash(kind=self.kind, name=name, claimants=tuple(others), winner=winner)

    def _winner(self, name: str) -> tuple[PluginStatus, E] | None:
        clash = self._clash(name)
        return None if clash and not clash.winner else self._claims[name][0]

    def _owned(self, name: str) -> tuple[PluginStatus, E]:
        if name not in self._claims:
            raise self._unknown(name)
        winner = self._winner(name)
        if winner is None:
            claimed = " and ".join(status.label for status, _ in self._claims[name])
            raise PluginError(
                f"{self.noun} '{name}' is given by two plugins, {claimed}. "
                f"Block one: --no-plugin {self._claims[name][-1][0].name}"
            )
        return winner

    def _unknown(self, name: str) -> ZooError:
        absent = would_provide(name, self._plugins.statuses)
        if absent:
            more = "" if absent.status == "blocked" else f" (zoo plugins info {absent.name})"
            return PluginError(
                f"{self.noun} '{name}' would come from plugin {absent.label}, "
                f"which is {absent.status}: {absent.reason}{more}"
            )
        known = sorted({*self.names(), *self._reserved})
        listed = f"known: {', '.join(known)}" if known else f"no plugin provides any {self.noun}: zoo plugins"
        guess = did_you_mean(name, known) or "no name is near"
        return UsageError(f"unknown {self.noun} '{name}': {guess} ({listed})")


def would_provide(name: str, statuses: Collection[PluginStatus]) -> PluginStatus | None:
    """The plugin that is not loaded and would give this name, judged by its own name and by its unimported source."""
    absent = [status for status in statuses if not status.ok]
    for status in absent:
        if _alike(name, status.name) or _alike(name, status.dist):
            return status
    for status in absent:
        text = status.source.text()
        if f'"{name}"' in text or f"'{name}'" in text:
            return status
    return None


def _alike(wanted: str, own: str) -> bool:
    parts = set(normalised(own).split("-")) - {"zoo", "plugin", ""}
    return bool(parts) and parts <= set(normalised(wanted).split("-"))
