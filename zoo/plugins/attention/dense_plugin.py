"""Offers the `dense` attention backend: the oracle, for any device and dtype."""

from __future__ import annotations

from zoo.core.entries import AttentionEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="dense",
            target="zoo.plugins.attention.dense:Dense",
            help="plain matrix products and softmax, any device and dtype: the oracle, not fast",
        ),
    )
