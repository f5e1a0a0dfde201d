"""Offers the `flex` attention backend: torch's FlexAttention, for what the fused kernels refuse."""

from __future__ import annotations

from zoo.core.entries import AttentionEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="flex",
            target="zoo.plugins.attention.flex:Flex",
            help="torch FlexAttention with block masks: odd head sizes, float32; compiled on CUDA, plain on CPU",
        ),
    )
