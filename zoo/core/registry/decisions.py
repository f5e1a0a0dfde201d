"""What all plugins together offer and decide. Core asks here; it never learns which plugin is behind a name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.core.contracts.entries import (
    AttentionEntry,
    CommandEntry,
    ContextSchemeEntry,
    ConverterEntry,
    DataFormatEntry,
    MemoryPolicyEntry,
    ModelEntry,
    ParallelAdapterEntry,
    TrackerEntry,
)
from zoo.core.errors import PluginError, ZooError, one_line
from zoo.core.registry.catalog import Catalog, Clash, stdout_kept
from zoo.core.registry.loading import Plugins, PluginStatus

if TYPE_CHECKING:
    from zoo.core.contracts.attention import AttentionProblem, Forecast
    from zoo.core.contracts.data import DataSource
    from zoo.core.contracts.layout import Layout
    from zoo.core.contracts.run import RunInfo


class Registry:
    """Entries by kind and name, and the decisions of plugins, each checked before it is believed.

    `reserved` maps a kind to names that zoo itself has taken, such as core commands.
    """

    def __init__(self, plugins: Plugins, *, reserved: Mapping[str, Collection[str]] | None = None) -> None:
        taken = reserved or {}
        self.plugins = plugins
        self._deciders: dict[str, PluginStatus] = {}
        self.models = Catalog[ModelEntry]("models", plugins)
        self.attention = Catalog[AttentionEntry]("attention", plugins)
        self.context_schemes = Catalog[ContextSchemeEntry]("context_schemes", plugins)
        self.parallel_adapters = Catalog[ParallelAdapterEntry]("parallel_adapters", plugins)
        self.memory_policies = Catalog[MemoryPolicyEntry]("memory_policies", plugins)
        self.converters = Catalog[ConverterEntry]("converters", plugins)
        self.data_formats = Catalog[DataFormatEntry]("data_formats", plugins)
        self.trackers = Catalog[TrackerEntry]("trackers", plugins)
        self.commands = Catalog[CommandEntry]("commands", plugins, reserved=taken.get("commands", ()))
        self.lookups = tuple(value for value in vars(self).values() if isinstance(value, Catalog))

    def owner(self, kind: str, name: str) -> PluginStatus:
        """The plugin that gives `name` of `kind` (`attention`, `models`, ...). Raises as `Catalog.get`."""
        return next(lookup for lookup in self.lookups if lookup.kind == kind).owner(name)

    def clashes(self) -> list[Clash]:
        """Every name that more than one plugin gives."""
        return [clash for lookup in self.lookups for clash in lookup.clashes()]

    def passed_over(self) -> list[str]:
        """One line for each entry that a choice left out because its plugin failed."""
        return [broken.sentence for lookup in self.lookups for broken in lookup.broken.values()]

    def select_attention(self, problem: AttentionProblem, candidates: Sequence[str]) -> str | None:
        """The first choice of a plugin, None if none has one. Raises PluginError for one outside `candidates`."""
        return self._choice("zoo_select_attention", candidates, problem=problem, candidates=candidates)

    def select_context_scheme(
        self, layout: Layout, window: int | None, candidates: Mapping[str, Forecast]
    ) -> str | None:
        """As `select_attention`."""
        return self._choice(
            "zoo_select_context_scheme", list(candidates), layout=layout, window=window, candidates=candidates
        )

    def select_memory_policy(
        self, saved_bytes: Mapping[str, int], budget_bytes: int, candidates: Sequence[str]
    ) -> str | None:
        """As `select_attention`."""
        return self._choice(
            "zoo_select_memory_policy",
            candidates,
            saved_bytes=saved_bytes,
            budget_bytes=budget_bytes,
            candidates=candidates,
        )

    def match_checkpoint(self, config: Mapping[str, Any]) -> str | None:
        """The family that a config.json belongs to, None if nobody knows it. Raises PluginError for an unknown one."""
        return self._choice("zoo_match_checkpoint", self.models.names(), config=config)

    def rope_for_length(self, model: str, config: Mapping[str, Any], seq: int) -> Mapping[str, Any] | None:
        """The config.json fields to change for rows of `seq` tokens, None if nobody has a word on it."""
        fields = self._first("zoo_rope_for_length", model=model, config=config, seq=seq)
        if fields is None:
            return None
        if not isinstance(fields, Mapping):
            raise self._disbelief("zoo_rope_for_length", fields, "no mapping of config.json fields")
        return fields

    def detect_data_format(self, columns: Collection[str]) -> str | None:
        """The format of a record with these columns, None if nobody knows. Raises PluginError for an unknown one."""
        return self._choice("zoo_detect_data_format", self.data_formats.names(), columns=columns)

    def open_data(self, uri: str) -> DataSource | None:
        """The corpus behind `--data URI`, None if nobody can open it. Raises DataError if it cannot be read."""
        source: DataSource | None = self._first("zoo_open_data", uri=uri)
        return source

    def decider(self, hook: str) -> PluginStatus | None:
        """The plugin that gave the last answer to a decision hook, so that choices can be explained."""
        return self._deciders.get(hook)

    def check_layout(self, layout: Layout) -> list[tuple[str, str]]:
        """Every objection to a layout, as (plugin, sentence). Raises PluginError if a plugin cannot judge."""
        objections = []
        for plugin, implementation in self.plugins.implementations("zoo_check_layout"):
            sentence = _asked(plugin, "zoo_check_layout", implementation, {"layout": layout})
            if sentence is None:
                continue
            if not isinstance(sentence, str):
                self._deciders["zoo_check_layout"] = plugin
                raise self._disbelief("zoo_check_layout", sentence, "neither a sentence nor None")
            objections.append((plugin.label, sentence))
        return objections

    def _choice(self, hook: str, allowed: Collection[str], **arguments: Any) -> str | None:
        answer = self._first(hook, **arguments)
        if answer is None:
            return None
        if not isinstance(answer, str) or answer not in allowed:
            raise self._disbelief(hook, answer, f"not among: {', '.join(allowed) or 'nothing'}")
        return answer

    def _first(self, hook: str, **arguments: Any) -> Any:
        for plugin, implementation in self.plugins.implementations(hook):
            answer = _asked(plugin, hook, implementation, arguments)
            if answer is not None:
                self._deciders[hook] = plugin
                return answer
        self._deciders.pop(hook, None)
        return None

    def _disbelief(self, hook: str, answer: object, why: str) -> PluginError:
        plugin = self._deciders[hook]
        return PluginError(
            f"plugin {plugin.label} answered {hook} with {answer!r}, which is {why}. "
            f"Go without it: --no-plugin {plugin.name}"
        )


def _asked(plugin: PluginStatus, hook: str, implementation: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return implementation(**arguments)
    except ZooError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.label} failed in {hook}: {one_line(error)}. Go without it: --no-plugin {plugin.name}"
        ) from error


class Observers:
    """Those who watch a run. What one of them raises is said once and ends its watching, never the run."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._disabled: set[str] = set()
        moments = ("run_start", "step_end", "checkpoint_saved", "run_error", "run_end")
        self._watching = {moment: plugins.implementations(f"zoo_{moment}") for moment in moments}

    def run_start(self, run: RunInfo) -> None:
        self._tell("run_start", run=run)

    def step_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._tell("step_end", run=run, step=step, metrics=metrics)

    def checkpoint_saved(self, run: RunInfo, step: int, path: str) -> None:
        self._tell("checkpoint_saved", run=run, step=step, path=path)

    def run_error(self, run: RunInfo, error: BaseException) -> None:
        self._tell("run_error", run=run, error=error)

    def run_end(self, run: RunInfo, status: str) -> None:
        self._tell("run_end", run=run, status=status)

    def _tell(self, moment: str, **arguments: Any) -> None:
        for plugin, implementation in self._watching[moment]:
            if plugin.source.key in self._disabled:
                continue
            try:
                with stdout_kept():
                    implementation(**arguments)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: no observer may end a run
                self._disabled.add(plugin.source.key)
                sys.stderr.write(
                    f"plugin {plugin.label} failed in zoo_{moment} and watches no more: {one_line(error)}\n"
                )
