"""Offers the `flex` attention backend: torch's FlexAttention, for what the fused kernels refuse."""

from __future__ import annotations

from zoo import AttentionEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="flex",
            target="zoo.plugins.attention.flex:Flex",
            help="torch FlexAttention with block masks: odd head sizes, float32; compiled on CUDA, plain on CPU",
        ),
    )
