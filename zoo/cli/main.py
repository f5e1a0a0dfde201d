"""The `zoo` command: finds the command meant, loads it only then, and turns every error into one line and a status."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import click

from zoo.cli.session import KEY, Session
from zoo.core.contracts.entries import load_target
from zoo.core.errors import SavedOnSignal, ZooError, one_line
from zoo.core.launch.signals import status_for_launcher
from zoo.version import __version__

CORE_COMMANDS: dict[str, tuple[str, str]] = {
    "models": ("zoo.cli.models:models", "List model families and their sizes."),
    "plan": ("zoo.cli.plan:plan", "Say what a job would do and need, without running it."),
    "finetune": ("zoo.cli.finetune:finetune", "Train a model on long sequences."),
    "launch": ("zoo.cli.launch:launch", "Write the script or manifest that runs a job on many nodes."),
    "data": ("zoo.cli.data:data", "Look at training data as training will see it."),
    "import": ("zoo.cli.import_:import_", "Check a Hugging Face checkpoint and copy it here."),
    "export": ("zoo.cli.export:export", "Write a run as a Hugging Face checkpoint."),
    "bench": ("zoo.cli.bench:bench", "Compare context schemes: work, balance, bytes, time."),
    "plugins": ("zoo.cli.plugins:plugins", "List plugins, their state and what they provide."),
    "doctor": ("zoo.cli.doctor:doctor", "Say what this machine has and what would fail on it."),
}
"""Name to target and help, so that neither `zoo --help` nor another command imports it."""

_INSPECTING = ("plugins", "doctor")
_GLOBAL_OPTIONS = ("--plugin", "--no-plugin")


class LazyGroup(click.Group):
    """Core commands by name, then those of plugins; none is imported before it is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        front, rest = _global_options(args)
        ctx.meta[KEY] = Session(
            block=[value for option, value in front if option == "--no-plugin"],
            files=[value for option, value in front if option == "--plugin"],
            core_commands=CORE_COMMANDS,
        )
        return super().parse_args(ctx, [*(word for pair in front for word in pair), *(rest or ["--help"])])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _own_pipes():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _own_pipes(), _plugins_named(ctx):
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*CORE_COMMANDS, *_session(ctx).registry.commands.names()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in CORE_COMMANDS:
            module, _, attribute = CORE_COMMANDS[cmd_name][0].partition(":")
            core: click.Command = getattr(importlib.import_module(module), attribute)
            return core
        commands = _session(ctx).registry.commands
        return commands.load(cmd_name) if cmd_name in commands else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            _session(ctx).registry.commands.get(name)  # raises: unknown, or its plugin is not loaded
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        session = _session(ctx)
        session.report()
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in CORE_COMMANDS.items()])
        added = list(session.registry.commands)
        if added:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(entry.name, entry.help) for entry in added])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--no-plugin", metavar="NAME", multiple=True, help="Do without a plugin or a distribution of plugins.")
@click.option("--plugin", metavar="FILE.py", multiple=True, help="Load a plugin that is not installed.")
@click.version_option(__version__, prog_name="zoo")
@click.pass_context
def cli(ctx: click.Context, no_plugin: tuple[str, ...], plugin: tuple[str, ...]) -> None:
    """Fine-tune long-context language models; everything that can differ is a plugin."""
    session = _session(ctx)
    session.inspecting = ctx.invoked_subcommand in _INSPECTING
    if not session.inspecting:
        session.report()
    ctx.obj = session.plugins


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. No exception leaves it but SystemExit."""
    return status_for_launcher(_run(args))


def _run(args: Sequence[str] | None) -> int:
    try:
        status = cli.main(args=args, prog_name="zoo", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        return _say(f"Error: {_usage(error)}", error.exit_code)
    except SavedOnSignal as saved:
        return _say(str(saved), saved.exit_code)
    except ZooError as error:
        return _say(f"Error: {error}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _say("Interrupted", 130)
    except (_PipeClosed, BrokenPipeError) as error:
        # As if SIGPIPE had ended it: what the shell expects of `zoo models | head -1`.
        return 141 if _stdout_is_closed() else _unexpected(error.__cause__ or error)
    except Exception as error:
        return _unexpected(error)
    return status if isinstance(status, int) else 0


def _unexpected(error: BaseException) -> int:
    hint = "This is a fault of zoo or of a plugin; ZOO_DEBUG=1 shows the traceback"
    return _say(f"Error: {one_line(error)}. {hint}", 1)


class _PipeClosed(Exception):
    """A BrokenPipeError under a name that click does not swallow, whichever pipe it was."""


@contextlib.contextmanager
def _own_pipes() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _PipeClosed from error


@contextlib.contextmanager
def _plugins_named(ctx: click.Context) -> Iterator[None]:
    """Name the plugin that an error is of. What click understands, and a status of a plugin's own command, stay."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and ctx.invoked_subcommand not in CORE_COMMANDS:
            raise
        # Imported now, for it costs each command some time.
        told = load_target("zoo.core.registry.failures:named")(error, _session(ctx).loaded)
        if told is error:
            raise
        raise told from error


def _say(line: str, status: int) -> int:
    if os.environ.get("ZOO_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    click.echo(line, err=True)
    return status


def _usage(error: click.ClickException) -> str:
    text = error.format_message().strip().replace("\n", " ")
    text = text if text.endswith((".", "?", ")")) else f"{text}."
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{text} See {context.command_path} --help" if context else text


def _stdout_is_closed() -> bool:
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        return False
    # The interpreter flushes once more on its way out; give it somewhere to write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _session(ctx: click.Context) -> Session:
    session: Session = ctx.meta[KEY]
    return session


def _global_options(args: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take `--plugin X` and `--no-plugin X` from anywhere before a `--`, so that they work after the command too."""
    front: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif option in _GLOBAL_OPTIONS:
            front.append((option, value if equals else _value_of(option, next(words, None))))
        else:
            rest.append(word)
    return front, rest


def _value_of(option: str, value: str | None) -> str:
    if value is None:
        raise click.UsageError(f"Option '{option}' requires an argument")
    return value
