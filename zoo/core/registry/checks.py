"""What a plugin must be before it is let in: hooks that will really be called, and entries that are what they say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from zoo.core.contracts.entries import (
    AttentionEntry,
    CommandEntry,
    ContextSchemeEntry,
    ConverterEntry,
    DataFormatEntry,
    Entry,
    MemoryPolicyEntry,
    ModelEntry,
    ParallelAdapterEntry,
    TrackerEntry,
)
from zoo.core.errors import did_you_mean
from zoo.core.registry import hookspecs

REGISTRATIONS: Mapping[str, type[Entry]] = {
    "models": ModelEntry,
    "attention": AttentionEntry,
    "context_schemes": ContextSchemeEntry,
    "parallel_adapters": ParallelAdapterEntry,
    "memory_policies": MemoryPolicyEntry,
    "converters": ConverterEntry,
    "data_formats": DataFormatEntry,
    "trackers": TrackerEntry,
    "commands": CommandEntry,
}
"""Kind to the entries that `zoo_register_<kind>` returns."""

HOOKS: tuple[str, ...] = tuple(name for name in vars(hookspecs) if name.startswith("zoo_"))
"""Every hook, in the order of hookspecs.py."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FILLED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class PluginProblem(Exception):
    """Why a plugin is not let in, as one line for its author."""


def implemented_hooks(manager: pluggy.PluginManager, plugin: object) -> dict[str, Callable[..., Any]]:
    """Hook name to this plugin's implementation, all of them sure to be called with what they ask for.

    Raises PluginProblem for what pluggy accepts and then never calls (a misspelled or unmarked hook), never fills
    (a parameter with a default), or refuses (an unknown argument).
    """
    if inspect.isclass(plugin):
        raise PluginProblem(f"its entry point names the class {plugin.__name__}: name a module or an instance")
    found: dict[str, Callable[..., Any]] = {}
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            _refuse_unmarked(plugin, attribute)
            continue
        hook = options.get("specname") or attribute
        if hook not in HOOKS and options.get("optionalhook"):
            continue
        function = getattr(plugin, attribute)
        _check_hook(manager, hook, function, options)
        found[hook] = function
    if not found:
        raise PluginProblem("it implements no hook: mark functions such as zoo_register_models with @zoo.hookimpl")
    return found


def _refuse_unmarked(plugin: object, attribute: str) -> None:
    if attribute in HOOKS and inspect.isroutine(inspect.getattr_static(plugin, attribute, None)):
        raise PluginProblem(f"{attribute} is not marked: write @zoo.hookimpl above it")


def _check_hook(
    manager: pluggy.PluginManager, hook: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> None:
    if hook not in HOOKS:
        raise PluginProblem(f"unknown hook '{hook}': {did_you_mean(hook, HOOKS) or 'see docs/hooks.md'}")
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginProblem(f"{hook} is a wrapper: a plugin of zoo speaks for itself only, drop wrapper=True")
    if inspect.iscoroutinefunction(function):
        raise PluginProblem(f"{hook} is a coroutine, which nobody would await: write a plain def")
    spec = getattr(manager.hook, hook).spec
    for parameter in inspect.signature(function).parameters.values():
        _check_parameter(hook, parameter, tuple(spec.argnames))


def _check_parameter(hook: str, parameter: inspect.Parameter, offered: tuple[str, ...]) -> None:
    offer = f"it offers {', '.join(offered)}" if offered else "it offers none"
    if parameter.kind not in _FILLED:
        raise PluginProblem(f"{hook} takes {parameter}, which is never filled: name the arguments it needs ({offer})")
    if parameter.name not in offered:
        guess = did_you_mean(parameter.name, offered)
        raise PluginProblem(f"{hook} asks for an unknown argument '{parameter.name}': {guess or offer}")
    if parameter.default is not inspect.Parameter.empty:
        raise PluginProblem(f"{hook} gives '{parameter.name}' a default, so it would never be filled: drop the default")


def gathered_entries(hooks: Mapping[str, Callable[..., Any]]) -> dict[str, tuple[Entry, ...]]:
    """Call the registration hooks of one plugin: kind to its entries, empty kinds left out. Raises PluginProblem."""
    found = {}
    for kind, entry_type in REGISTRATIONS.items():
        hook = f"zoo_register_{kind}"
        if hook in hooks:
            found[kind] = _checked_entries(hook, entry_type, hooks[hook]())
    return {kind: entries for kind, entries in found.items() if entries}


def _checked_entries(hook: str, entry_type: type[Entry], answer: object) -> tuple[Entry, ...]:
    if not isinstance(answer, list | tuple):
        raise PluginProblem(f"{hook} returned {_named(answer)}: return a list of {entry_type.__name__}")
    for entry in answer:
        if not isinstance(entry, entry_type):
            raise PluginProblem(f"{hook} returned a list with {_named(entry)}: it takes {entry_type.__name__} only")
        _check_entry(hook, entry)
    names = [entry.name for entry in answer]
    for name in names:
        if names.count(name) > 1:
            raise PluginProblem(f"{hook} returned two entries named '{name}': names are unique")
    return tuple(answer)


def _named(value: object) -> str:
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


def _check_entry(hook: str, entry: Entry) -> None:
    if not isinstance(entry.name, str) or not _NAME.fullmatch(entry.name):
        raise PluginProblem(f"{hook} returned an entry named {entry.name!r}: use letters, digits, dots and dashes")
    if not isinstance(entry.target, str) or not _TARGET.fullmatch(entry.target):
        raise PluginProblem(f"'{entry.name}' of {hook} has target {entry.target!r}: write 'package.module:attribute'")
    if not isinstance(entry.help, str):
        raise PluginProblem(f"'{entry.name}' of {hook} has a help that is no text")
    if isinstance(entry, ModelEntry):
        _check_model(entry)
    if isinstance(entry, ParallelAdapterEntry) and not isinstance(entry.axes, tuple):
        raise PluginProblem(f"adapter '{entry.name}' has axes {entry.axes!r}: write a tuple of mesh axes")


def _check_model(entry: ModelEntry) -> None:
    sizes = entry.sizes
    if not isinstance(sizes, Mapping) or not all(isinstance(fields, Mapping) for fields in sizes.values()):
        raise PluginProblem(f"model '{entry.name}' has sizes that do not map a name to the fields of a config.json")
    if entry.default_size not in sizes:
        raise PluginProblem(f"model '{entry.name}' has no size '{entry.default_size}', its default_size")
    for field in ("hub_ids", "embedded", "recipes", "parameters", "kv_heads"):
        named = getattr(entry, field)
        if not isinstance(named, Mapping):
            raise PluginProblem(f"model '{entry.name}' has {field} that do not map the name of a size to anything")
        unknown = sorted(set(named) - set(sizes))
        if unknown:
            raise PluginProblem(f"model '{entry.name}' has no size '{unknown[0]}', which its {field} names")
    for size, number in entry.parameters.items():
        if not _is_count(number):
            raise PluginProblem(
                f"model '{entry.name}' has {number!r} parameters at size '{size}': write an int above 0"
            )
    for size, heads in entry.kv_heads.items():
        most = sizes[size].get("num_hidden_layers", len(heads))
        if not all(map(_is_count, heads)) or len(heads) > most:
            raise PluginProblem(
                f"model '{entry.name}' has kv_heads {list(heads)} at size '{size}': write an int above 0 for each "
                f"attention layer, at most {most}"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
