"""What every command is given: the plugins that `--plugin` and `--no-plugin` leave, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import click
from click.decorators import pass_meta_key

from zoo.core.machine.launcher_env import speaks
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins


class Session:
    """The plugins and the registry of one command line."""

    def __init__(
        self, *, block: Collection[str] = (), files: Collection[str] = (), core_commands: Collection[str] = ()
    ) -> None:
        self._block = tuple(block)
        self._files = tuple(files)
        self._core_commands = tuple(core_commands)
        self.inspecting = False
        """Set by commands that show broken plugins instead of being stopped by them."""

    @cached_property
    def plugins(self) -> Plugins:
        """Raises PluginError if a `--plugin FILE.py` cannot be loaded, or any plugin under ZOO_STRICT_PLUGINS."""
        return Plugins.load(block=self._block, files=self._files, strict=False if self.inspecting else None)

    @property
    def loaded(self) -> Plugins | None:
        """The plugins, if they were loaded already."""
        found: Plugins | None = vars(self).get("plugins")
        return found

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.plugins, reserved={"commands": self._core_commands})

    def report(self) -> None:
        """One line on stderr for each plugin that should be here and is not. Said by rank 0 only.

        Raises PluginError for a file, which somebody asked for by name.
        """
        failed = self.plugins.failed()
        self.plugins.refuse_failed([status for status in failed if status.source.file])
        if not speaks():
            return
        for note in self.plugins.notes:
            click.echo(f"warning: {note}", err=True)
        for status in failed:
            click.echo(f"plugin {status.label} is {status.status}: {status.reason}", err=True)


KEY = "zoo.session"
"""Where click's context keeps it. A command that only needs the plugins takes them by `@click.pass_obj`."""

pass_session = pass_meta_key(KEY)
