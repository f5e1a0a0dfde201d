"""Metrics sinks of a run. What one of them raises is said once and ends its part in the run, never the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.core.contracts.run import Tracker
from zoo.core.errors import one_line
from zoo.core.registry.answers import checked_tracker
from zoo.core.registry.catalog import stdout_kept
from zoo.core.registry.decisions import Registry


class Trackers:
    """The trackers that were asked for, while they work. On rank 0 only."""

    def __init__(self, registry: Registry, names: Sequence[str], run: Path) -> None:
        self._registry = registry
        self._working: dict[str, Tracker] = {}
        for name in names:
            made = self._called(
                name, "its construction", lambda name=name: checked_tracker(name, registry.trackers.load(name)(run))
            )
            if made is not None:
                self._working[name] = made

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics of a step to each."""
        for name, tracker in list(self._working.items()):
            self._called(name, "log", lambda tracker=tracker: tracker.log(step, metrics))

    def close(self) -> None:
        """Close each, once."""
        for name, tracker in list(self._working.items()):
            self._called(name, "close", lambda tracker=tracker: tracker.close())
        self._working.clear()

    def _called(self, name: str, method: str, call: Callable[..., Any]) -> Any:
        try:
            with stdout_kept():
                return call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: no tracker may end a run
            self._working.pop(name, None)
            owner = self._registry.trackers.owner(name)
            sys.stderr.write(
                f"warning: tracker '{name}' of plugin {owner.label} failed in {method} and is disabled for the rest of "
                f"the run: {one_line(error)}. Go without it: leave out --track {name}\n"
            )
            return None
