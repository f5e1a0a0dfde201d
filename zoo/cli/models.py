"""`zoo models`: the families, their sizes, how far each axis can cut them, and the plugin each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from zoo.cli.session import Session, pass_session
from zoo.core.contracts.entries import ModelEntry
from zoo.core.humanize import format_count, format_tokens, table
from zoo.core.model.axis_limits import axis_limits, kv_heads

_SHAPE = ("PARAMS", "LAYERS", "HIDDEN", "HEADS", "KV", "CONTEXT", "VOCAB")
_HEADER = ("MODEL", "SIZE", *_SHAPE, "CP", "TP", "EP", "PP", "CHECKPOINT", "FROM")
_CUT = ("cp", "tp", "ep", "pp")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_session
def models(session: Session, as_json: bool) -> None:
    """List model families and their sizes: parameters, shape, native context, vocabulary, what can be cut, checkpoint.

    A column of an axis says which degrees the model allows: any, the divisors of a number, or a range.
    """
    rows = [row for entry in session.registry.models for row in _rows(entry, session)]
    unserved = _unserved(session)
    if as_json:
        click.echo(json.dumps({"models": rows, "unserved_axes": unserved}, indent=2))
        return
    click.echo(table(_HEADER, [_cells(row) for row in rows]))
    if unserved:
        click.echo(f"\nno plugin here serves {' and '.join(f'--{axis}' for axis in unserved)} yet")


def _unserved(session: Session) -> list[str]:
    served = {axis for entry in session.registry.parallel_adapters for axis in entry.axes}
    return [axis for axis in _CUT if axis not in served]


def _rows(entry: ModelEntry, session: Session) -> list[dict[str, Any]]:
    owner = session.registry.models.owner(entry.name)
    return [
        {
            "model": entry.name,
            "size": size,
            "model_type": entry.model_type,
            "default": size == entry.default_size,
            "parameters": entry.parameters.get(size),
            "layers": fields.get("num_hidden_layers"),
            "hidden": fields.get("hidden_size"),
            "heads": fields.get("num_attention_heads"),
            "kv_heads": list(kv_heads(fields, entry.kv_heads.get(size, ()))),
            "context": fields.get("max_position_embeddings"),
            "vocab": fields.get("vocab_size"),
            "allows": _allows(fields, entry.kv_heads.get(size, ())),
            "checkpoint": "embedded" if size in entry.embedded else entry.hub_ids.get(size),
            "plugin": owner.name,
            "dist": owner.dist or owner.source.file,
        }
        for size, fields in entry.sizes.items()
    ]


def _allows(fields: Mapping[str, Any], by_layer: Sequence[int]) -> dict[str, Any]:
    """Axis to "any", to the degrees it may have, or to the largest; null where there is nothing to cut, or unknown."""
    limits = axis_limits(fields, by_layer)
    return {"cp": "any", "tp": limits.tp, "ep": limits.ep, "pp": limits.pp}


def _cells(row: Mapping[str, Any]) -> list[str]:
    params = format_count(row["parameters"]) if row["parameters"] else ""
    counts = [_text(row[key]) for key in ("layers", "hidden", "heads")]
    shared = row["kv_heads"]
    heads = "-".join(map(str, dict.fromkeys([shared[0], shared[-1]]))) if shared else ""
    context = format_tokens(row["context"]) if isinstance(row["context"], int) else ""
    cut = [_degrees(row["allows"][axis]) for axis in _CUT]
    return [
        row["model"],
        row["size"],
        params,
        *counts,
        heads,
        context,
        _text(row["vocab"]),
        *cut,
        row["checkpoint"] or "",
        row["dist"],
    ]


def _degrees(allowed: Any) -> str:
    if isinstance(allowed, tuple):
        return f"div {allowed[-1]}"
    return f"1-{allowed}" if isinstance(allowed, int) else _text(allowed)


def _text(value: object) -> str:
    return "" if value is None else str(value)
