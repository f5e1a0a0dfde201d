"""`zoo plugins`: every plugin, whether it is loaded and what it provides; `zoo plugins info NAME`: all about one."""

from __future__ import annotations

import json
import traceback
from dataclasses import replace
from typing import Any

import click

from zoo.cli.session import Session, pass_session
from zoo.core.errors import UsageError, did_you_mean, normalised
from zoo.core.humanize import table
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import PluginStatus

_HEADER = ("NAME", "VERSION", "API", "STATUS", "PROVIDES", "FROM")


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
@pass_session
def plugins(session: Session, ctx: click.Context, as_json: bool) -> None:
    """List plugins, their state and what they provide."""
    if ctx.invoked_subcommand:
        return
    found = [tried(status, session.registry) for status in session.plugins.statuses]
    clashes = session.registry.clashes()
    if as_json:
        listed = {
            "plugins": [_facts(status) for status in found],
            "clashes": [{"kind": c.kind, "name": c.name, "sentence": c.sentence} for c in clashes],
            "notes": list(session.plugins.notes),
        }
        click.echo(json.dumps(listed, indent=2))
        return
    click.echo(table(_HEADER, [_cells(status) for status in found]))
    for line in [*(clash.sentence for clash in clashes), *session.plugins.notes]:
        click.echo(f"\n{line}")


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_session
def info(session: Session, name: str, as_json: bool) -> None:
    """Say everything about one plugin; NAME is a plugin's or a distribution's."""
    found = [tried(status, session.registry) for status in _named(session, name)]
    if as_json:
        click.echo(json.dumps([_facts(status) for status in found], indent=2))
    else:
        click.echo("\n\n".join(_described(status, session) for status in found))


def tried(status: PluginStatus, registry: Registry) -> PluginStatus:
    """Return the status of a plugin once its entries were imported: it is broken if one of them cannot be used.

    Built-ins are taken to be whole: their imports would take seconds.
    """
    own = [] if status.source.builtin else [(kind, e.name) for kind, some in status.entries.items() for e in some]
    # A name that clashes is told as such, and cannot be imported by its name.
    names = {lookup.kind: lookup for lookup in registry.lookups}
    usable = [(kind, name) for kind, name in own if name in names[kind] and names[kind].owner(name) is status]
    flaws = [flaw for kind, name in usable if (flaw := names[kind].flaw(name))]
    if not flaws:
        return status
    trace = "".join(traceback.format_exception(flaws[0].error))
    return replace(
        status, status="broken", reason="; ".join(f"{flaw.entry} {flaw.why}" for flaw in flaws), traceback=trace
    )


def _named(session: Session, name: str) -> list[PluginStatus]:
    statuses = session.plugins.statuses
    found = [s for s in statuses if normalised(name) in (normalised(s.name), normalised(s.dist))]
    if not found:
        known = {known for s in statuses for known in (s.name, s.dist) if known}
        raise UsageError(
            f"no plugin '{name}': {did_you_mean(name, known) or 'no name is near'} (zoo plugins lists them)"
        )
    return found


def _facts(status: PluginStatus) -> dict[str, Any]:
    entries = [(kind, entry) for kind, entries in status.entries.items() for entry in entries]
    return {
        "name": status.name,
        "dist": status.dist,
        "version": status.version,
        "module": status.source.value,
        "file": status.source.file,
        "api": status.api,
        "status": status.status,
        "reason": status.reason,
        "traceback": status.traceback,
        "hooks": list(status.hooks),
        "provides": [{"kind": k, "name": e.name, "target": e.target, "help": e.help} for k, e in entries],
        "imports_torch": status.imports_torch,
    }


def _cells(status: PluginStatus) -> list[str]:
    origin = status.dist or status.source.file
    hint = f" -> zoo plugins info {status.name}" if status.status in ("broken", "skipped") else ""
    api = "" if status.api is None else str(status.api)
    return [status.name, status.version, api, status.status, _provides(status), f"{origin}{hint}"]


def _provides(status: PluginStatus) -> str:
    """Entries, or for a plugin without any the hooks it answers, or the reason it is not loaded."""
    if not status.ok:
        return status.reason
    others = [hook.removeprefix("zoo_") for hook in status.hooks if not hook.startswith("zoo_register_")]
    return " ".join(status.provides or others)


def _described(status: PluginStatus, session: Session) -> str:
    where = status.source.file or f"{status.dist} {status.version}".strip()
    lines = [
        f"{status.name}: {status.status}{f', {status.reason}' if status.reason else ''}",
        f"from      {where}",
        f"module    {status.source.value or status.source.file}",
        f"api       {'not stated' if status.api is None else status.api}",
        *(f"hook      {hook}" for hook in status.hooks),
        *(
            f"provides  {kind}:{entry.name} = {entry.target}{f'  {entry.help}' if entry.help else ''}"
            for kind, entries in status.entries.items()
            for entry in entries
        ),
        *(
            f"clash     {clash.sentence}"
            for clash in session.registry.clashes()
            if status.source in [claimant.source for claimant in clash.claimants]
        ),
    ]
    if status.imports_torch:
        lines.append(
            "slow      it imports torch when loaded, and every command waits for that: import it in the target"
        )
    if status.traceback:
        lines += ["", status.traceback.rstrip(), ""]
    return "\n".join([*lines, *(f"next      {line}" for line in _next(status))])


def _next(status: PluginStatus) -> list[str]:
    if status.status == "blocked":
        return ["it was not imported; drop the option or variable named above to load it"]
    if status.status == "broken":
        return [
            "repair it, or ask its author: everything zoo knows is above (docs/plugins.md says what a plugin must be)",
            f"go without it: zoo --no-plugin {status.name} ...",
        ]
    if status.status == "skipped":
        return [f"pip install --upgrade {status.dist}"] if status.dist else []
    return []
