"""Offers the `dense` attention backend: the oracle, for any device and dtype."""

from __future__ import annotations

from zoo import AttentionEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="dense",
            target="zoo.plugins.attention.dense:Dense",
            help="plain matrix products and softmax, any device and dtype: the oracle, not fast",
        ),
    )
