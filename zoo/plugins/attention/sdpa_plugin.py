"""Offers torch's fused attention kernels, and chooses for `--attn auto` by device when no other plugin chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo import AttentionEntry, hookimpl

if TYPE_CHECKING:
    from zoo import AttentionProblem

ZOO_PLUGIN_API = 1

# cuDNN is as fast as any, but prepares an execution plan for every new shape, and packed rows have new shapes every
# step; so it stands behind the kernels that do not. Who cannot compute a problem is no candidate for it.
_RANKING = {"cuda": ("flash", "sdpa", "cudnn", "flex", "dense"), "cpu": ("sdpa", "flex", "dense")}


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
    ranking = _RANKING.get(problem.device, ("sdpa", "flex", "dense"))
    return next((name for name in ranking if name in candidates), None)
