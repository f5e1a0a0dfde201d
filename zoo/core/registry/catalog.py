"""The entries of one kind, by name: whose they are, what clashes, and which of them cannot be used."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, cast

from zoo.core.contracts.entries import Entry
from zoo.core.errors import PluginError, UsageError, ZooError, did_you_mean, normalised, one_line
from zoo.core.registry.loading import Plugins, PluginStatus

E = TypeVar("E", bound=Entry)
Answer = TypeVar("Answer")


class _Kind(NamedTuple):
    """What is said of entries of a kind, and what they must be."""

    noun: str
    contract: str
    """The name of what the target is, or of what its instances are."""
    needs: tuple[str, ...] = ()
    """Attributes that the contract has."""
    constructed: bool = False
    """The target is a class, called without arguments."""
    option: str = ""
    """The flag that takes a name of this kind."""


_MODEL = ("name", "parse", "hub_config", "build", "plan", "flops_per_token")
_ATTENTION = ("name", "supports", "forward", "backward")
_SCHEME = ("name", "splits_rows", "check", "plan", "forward", "backward")
_ADAPTER = (
    *("name", "axes", "phase", "keeps_weights_for_a_step", "check", "applies", "apply", "shard_batch"),
    *("forward_backward", "begin_microbatch", "complete_gradients", "whole", "account"),
)
"""What a subclass of ParallelAdapter has, but for names it must give itself."""
_POLICY = ("name", "apply", "saved_bytes")
_CONVERTER = ("name", "locate", "open", "export")
_FUNCTION = ("__call__",)

KINDS: Mapping[str, _Kind] = {
    "models": _Kind("model", "ModelSpec", _MODEL),
    "attention": _Kind("attention backend", "AttentionBackend", _ATTENTION, True, "--attn"),
    "context_schemes": _Kind("context scheme", "ContextScheme", _SCHEME, True, "--cp-scheme"),
    "parallel_adapters": _Kind("parallel adapter", "ParallelAdapter", _ADAPTER, True),
    "memory_policies": _Kind("memory policy", "MemoryPolicy", _POLICY, True, "--memory"),
    "converters": _Kind("checkpoint format", "Converter", _CONVERTER, option="--to"),
    "data_formats": _Kind("data format", "DataFormat", _FUNCTION, option="--data-format"),
    "trackers": _Kind("tracker", "function of the run directory", _FUNCTION, option="--track"),
    "commands": _Kind("command", "click.Command", ("make_context", "invoke")),
}
"""Every kind of entry, by the name of its registration hook."""


class Broken(NamedTuple):
    """An entry that cannot be used."""

    entry: str
    """As `attention backend 'fast'`."""
    label: str
    """Of its plugin."""
    why: str
    error: BaseException

    @property
    def sentence(self) -> str:
        """One line without a full stop."""
        return f"{self.entry} of plugin {self.label} {self.why}"


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
        return KINDS[self.kind].noun

    @property
    def sentence(self) -> str:
        claimed = " and ".join(status.label for status in self.claimants)
        if self.winner or self.by_zoo:
            return f"{self.noun} '{self.name}' is zoo's own; the one of {claimed} is passed over"
        return f"{self.noun} '{self.name}' is given by {claimed}; using it is an error until one is blocked"


class Catalog(Generic[E]):
    """Entries of one kind. `get` and `load` raise the error a user can act on; iteration gives what can be used."""

    def __init__(self, kind: str, plugins: Plugins, *, reserved: Collection[str] = ()) -> None:
        self.kind = kind
        self.noun = KINDS[kind].noun
        """What one entry is called in messages."""
        self.broken: dict[str, Broken] = {}
        """Entries that were passed over, by name."""
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
        """Import the target of an entry. Raises as `get` does, and PluginError if it cannot be used."""
        entry, kind = self.get(name), KINDS[self.kind]
        try:
            with stdout_kept():
                target = entry.load()
            contract = ("class", _FUNCTION) if kind.constructed else (kind.contract, kind.needs)
            _require(target, "the target", *contract)
        except BaseException as error:  # SystemExit too: no plugin may end zoo
            self._refuse(name, "imported", error)
        return target

    def make(self, name: str, *arguments: str) -> Any:
        """Return what an entry offers: an instance of its class, or the target itself. Raises as `load` does."""
        target, kind = self.load(name), KINDS[self.kind]
        if not kind.constructed:
            return target
        try:
            with stdout_kept():
                made = target(*arguments)
            _require(made, "an instance", kind.contract, kind.needs)
        except BaseException as error:
            self._refuse(name, "constructed", error)
        self._check_name(name, made)
        return made

    def _check_name(self, name: str, made: Any) -> None:
        """Compare the name of an instance with its entry's: config.yaml is written with it, and read by every rank."""
        own = made.name
        if not isinstance(own, str) or own.partition(":")[0] != name:
            raise PluginError(
                f"{self.noun} '{name}': its name is {own!r:.80}, and the contract says the name of its entry, "
                f"{name!r}; correct the plugin"
            )

    def made(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return what can be used of some entries, of all by default; `broken` has the others."""
        found = {}
        for name in self.names() if names is None else names:
            # Tried once: the import of a broken package may take seconds each time.
            if name not in self.broken:
                try:
                    if not self._wants_argument(name):
                        found[name] = self.make(name)
                except _Refused as refused:
                    self._pass_over(name, refused.why, refused.__cause__ or refused)
                except ZooError as error:
                    self._pass_over(name, f"cannot be used: {error}", error)
        return found

    def flaw(self, name: str) -> Broken | None:
        """Return why an entry cannot be used; None if it can, as far as can be seen before it is."""
        self.made([name])
        return self.broken.get(name)

    def _wants_argument(self, name: str) -> bool:
        """Return whether a scheme can only be had as `NAME:ARGUMENT`. Raises as `load` does."""
        target = self.load(name)
        if self.kind != "context_schemes":
            return False
        try:
            parameters = list(inspect.signature(target).parameters.values())
        except (TypeError, ValueError):
            return False
        return len(parameters) == 1 and parameters[0].default is inspect.Parameter.empty

    def asked(self, question: Callable[[Any], Answer], options: Mapping[str, Any]) -> dict[str, Answer]:
        """Return what each option answers. One of a third party that raises instead is passed over, into `broken`.

        For choices among all: who asked for an entry by name calls it, and gets what it raises.
        """
        answers = {}
        for name, option in options.items():
            try:
                answers[name] = question(option)
            except (KeyboardInterrupt, ZooError):
                raise
            except BaseException as error:
                if self.owner(name).source.builtin:
                    raise
                self._pass_over(name, f"failed when it was asked: {one_line(error)}", error)
        return answers

    def others(self, name: str) -> list[str]:
        """Return the names that can be used instead of one."""
        return [other for other in self.names() if other != name and other not in self.broken]

    def _refuse(self, name: str, what: str, error: BaseException) -> NoReturn:
        """Raise what is to be said of an entry that cannot be imported or constructed."""
        # What a plugin says in an error of zoo is meant for the user.
        if isinstance(error, (KeyboardInterrupt, ZooError)):
            raise error
        owner, entry = self._owned(name)
        why = f"cannot be {what}: {entry.target}: {one_line(error)}"
        other = f"choose another: {KINDS[self.kind].option} {', '.join(self.others(name)) or 'none'}".replace(
            ":  ", ": "
        )
        said = f"{self.noun} '{name}' of plugin {owner.label} {why}"
        raise _Refused(f"{said}. Repair it, {other}, or go without: --no-plugin {owner.name}", why) from error

    def _pass_over(self, name: str, why: str, error: BaseException) -> None:
        self.broken[name] = Broken(f"{self.noun} '{name}'", self.owner(name).label, why, error)

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
        absent = [status for status in self._plugins.statuses if not status.ok]
        for status in absent:
            if normalised(name) in (normalised(status.name), normalised(status.dist)):
                more = "" if status.status == "blocked" else f" (zoo plugins info {status.name})"
                return PluginError(
                    f"{self.noun} '{name}' would come from plugin {status.label}, "
                    f"which is {status.status}: {status.reason}{more}"
                )
        known = sorted({*self.names(), *self._reserved})
        guess = did_you_mean(name, known)
        listed = f"known: {', '.join(known)}" if known else f"no plugin provides any {self.noun}: zoo plugins"
        said = f"unknown {self.noun} '{name}': {guess or 'no name is near'} ({listed})"
        if guess or not absent:
            return UsageError(said)
        return PluginError(f"{said}; or of a plugin that is not loaded: {_listed(absent)}")


class _Refused(PluginError):
    """An entry that was asked for and cannot be used."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def stdout_kept() -> contextlib.redirect_stdout[Any]:
    """Keep what a plugin prints out of the command's own output, which may be somebody's pipe."""
    return contextlib.redirect_stdout(sys.stderr)


def _require(value: Any, said: str, contract: str, attributes: Collection[str]) -> None:
    """Raise TypeError if a value lacks one of the attributes that its contract has."""
    missing = [name for name in attributes if not hasattr(value, name)]
    if missing:
        raise TypeError(f"{said} is a {type(value).__name__} and no {contract}: it has no {', '.join(missing)}")


def _listed(absent: Collection[PluginStatus], most: int = 3) -> str:
    """Return which plugins are not loaded and why, the first few of them."""
    some = [f"{status.label}, which is {status.status}: {status.reason}" for status in list(absent)[:most]]
    return "; ".join([*some, *([f"and {len(absent) - most} more"] if len(absent) > most else [])]) + " (zoo plugins)"
