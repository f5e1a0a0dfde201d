"""Offers torch's fused attention kernels, and chooses `sdpa` for `--attn auto` when no other plugin chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.core.entries import AttentionEntry
from zoo.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from zoo.core.contracts import AttentionProblem


@hookimpl
def zoo_register_attention() -> tuple[AttentionEntry, ...]:
    return (
        AttentionEntry(
            name="sdpa",
            target="zoo.plugins.attention.sdpa:Sdpa",
            help="torch's fused kernels: flash on CPU; flash or memory-efficient on CUDA",
        ),
        AttentionEntry(
            name="cudnn",
            target="zoo.plugins.attention.sdpa_cuda:Cudnn",
            help="cuDNN's fused kernel through torch, on CUDA in bfloat16 or float16",
        ),
    )


@hookimpl(trylast=True)
def zoo_select_attention(problem: AttentionProblem, candidates: Sequence[str]) -> str | None:
    return "sdpa" if "sdpa" in candidates else None
