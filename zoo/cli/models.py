"""`zoo models`: the families, their sizes, and the plugin each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from zoo.cli.session import Session, pass_session
from zoo.cli.table import table
from zoo.core.entries import ModelEntry
from zoo.core.units import format_count, format_tokens

_HEADER = ("MODEL", "SIZE", "PARAMS", "LAYERS", "HIDDEN", "HEADS", "KV", "CONTEXT", "VOCAB", "CHECKPOINT", "FROM")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_session
def models(session: Session, as_json: bool) -> None:
    """List model families and their sizes: parameters, shape, native context, vocabulary, checkpoint."""
    rows = [row for entry in session.registry.models for row in _rows(entry, session)]
    if as_json:
        click.echo(json.dumps({"models": rows}, indent=2))
    else:
        click.echo(table(_HEADER, [_cells(row) for row in rows]))


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
            "kv_heads": fields.get("num_key_value_heads", fields.get("num_attention_heads")),
            "context": fields.get("max_position_embeddings"),
            "vocab": fields.get("vocab_size"),
            "checkpoint": "embedded" if size in entry.embedded else entry.hub_ids.get(size),
            "plugin": owner.name,
            "dist": owner.dist or owner.source.file,
        }
        for size, fields in entry.sizes.items()
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    params = format_count(row["parameters"]) if row["parameters"] else ""
    counts = [_text(row[key]) for key in ("layers", "hidden", "heads", "kv_heads")]
    context = format_tokens(row["context"]) if isinstance(row["context"], int) else ""
    more = [context, _text(row["vocab"]), row["checkpoint"] or "", row["dist"]]
    return [row["model"], row["size"], params, *counts, *more]


def _text(value: object) -> str:
    return "" if value is None else str(value)
