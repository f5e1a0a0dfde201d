"""Offers the `flash` attention backend: flash-attn 2, 3 or 4, whichever is installed."""

from __future__ import annotations

from zoo import AttentionEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="flash",
            target="zoo.plugins.attention.flash:Flash",
            help="flash-attn 2, 3 or 4 (extra `flash`): one launch a step, on CUDA in bfloat16 or float16",
        ),
    )
