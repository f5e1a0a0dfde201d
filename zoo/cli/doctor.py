"""`zoo doctor`: what this machine has, what would fail on it, and what to type about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from zoo.cli.plugins import tried
from zoo.cli.session import Session, pass_session
from zoo.core.humanize import table
from zoo.core.machine.checkup import Finding, machine_findings
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

_NEEDED = ("models", "attention", "data_formats")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
@pass_session
def doctor(session: Session, ctx: click.Context, as_json: bool) -> None:
    """Say what this machine has and what would fail on it. Exit status 1 if nothing could be trained here."""
    findings = [*machine_findings(), *plugin_findings(session.plugins, session.registry)]
    impossible = any(finding.level == "fail" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": not impossible, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        click.echo(report(findings))
    ctx.exit(1 if impossible else 0)


def plugin_findings(plugins: Plugins, registry: Registry) -> list[Finding]:
    """How many plugins are loaded, one finding for each that is not, for each clash, and for each kind nobody gives."""
    statuses = [tried(status, registry) for status in plugins.statuses]
    loaded = sum(status.ok for status in statuses)
    findings = [Finding("plugins", f"{loaded} of {len(statuses)} loaded")]
    for status in (status for status in statuses if status.status in ("broken", "skipped")):
        fix = f"zoo plugins info {status.name}"
        findings.append(Finding("plugin", f"{status.label} is {status.status}: {status.reason}", level="warn", fix=fix))
    findings += [Finding("plugin", clash.sentence, level="warn", fix="zoo plugins") for clash in registry.clashes()]
    blocked = [status.reason for status in plugins.statuses if status.status == "blocked"]
    fix = f"undo: {'; '.join(blocked)}" if blocked else "pip install --force-reinstall --no-deps zoo"
    for lookup in registry.lookups:
        if lookup.kind in _NEEDED and not lookup.names():
            missing = f"no plugin provides any {lookup.noun}, so nothing can be trained"
            findings.append(Finding("plugin", missing, level="fail", fix=fix))
    return findings


def report(findings: Sequence[Finding]) -> str:
    """What there is as a table, then what would fail, each with its fix."""
    lines = [table(("WHAT", "FOUND"), [(finding.topic, finding.found) for finding in findings])]
    troubles = [finding for finding in findings if finding.level != "ok"]
    for finding in troubles:
        said = "cannot train" if finding.level == "fail" else "would fail"
        lines += ["", f"{said}: {finding.trouble or finding.found}", f"  fix: {finding.fix}"]
    return "\n".join([*lines, "", "nothing found that would fail"] if not troubles else lines)
