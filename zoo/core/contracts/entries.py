"""Entries: what a registration hook returns. A name, a word of help, and a target that is imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def load_target(target: str) -> Any:
    """What "package.module:attribute" names, imported now; so a hook's module costs nothing until the hook is called.

    Raises whatever the import raises.
    """
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A named thing a plugin offers. `target` is "package.module:attribute", imported when first used."""

    name: str
    target: str
    help: str = ""

    def load(self) -> Any:
        """Import the target. Raises whatever the import raises."""
        return load_target(self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry(Entry):
    """A model family; the target is its `ModelSpec`. Everything `zoo models` prints is here."""

    model_type: str
    """The hub's family id, as in config.json (`llama`, `mixtral`)."""
    other_types: tuple[str, ...] = ()
    """Other family ids of the hub whose checkpoints it reads."""
    sizes: Mapping[str, Mapping[str, Any]]
    """Size name to the hub's config.json fields."""
    default_size: str
    """Size used where there are accelerators."""
    hub_ids: Mapping[str, str] = field(default_factory=dict)
    """Size name to the id of its published checkpoint."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Size name to its number of parameters."""
    kv_heads: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Size name to the K/V heads of each attention layer, where layers differ and the fields have no one number."""
    embedded: Mapping[str, str] = field(default_factory=dict)
    """Size name to the directory of a checkpoint that ships with the plugin."""
    tokenizer: str | None = None
    """Directory of the tokenizer for random weights; that of `embedded` if not given."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size name to settings that suit it, as dotted keys of a job: `{"optim.lr": 1e-3}`. A user's word wins."""


class AttentionEntry(Entry):
    """An attention backend; the target is a class whose instances are `AttentionBackend`s."""

    __slots__ = ()


class ContextSchemeEntry(Entry):
    """A context scheme; the target is a class whose instances are `ContextScheme`s."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAdapterEntry(Entry):
    """A parallel adapter; the target is a class whose instances are `ParallelAdapter`s."""

    axes: tuple[str, ...]
    """The mesh axes it gives a meaning to. A degree above 1 on an axis nobody serves is an error."""


class MemoryPolicyEntry(Entry):
    """A memory policy; the target is a class whose instances are `MemoryPolicy`s."""

    __slots__ = ()


class ConverterEntry(Entry):
    """A checkpoint format of somebody else's; the target is a `Converter`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormatEntry(Entry):
    """A form of training sample; the target is a `DataFormat`: a function from record to `Sample`."""

    overlong: str = "error"
    """What is done by default with a sample longer than a row: `error`, `split`, `truncate`, `drop`."""


class TrackerEntry(Entry):
    """A metrics sink asked for with `--track NAME`; the target is called with the run directory."""

    __slots__ = ()


class CommandEntry(Entry):
    """A click command; `help` is shown by `zoo --help` without importing the target."""

    __slots__ = ()
