"""The three generations of flash-attn by their own low-level functions, behind one pair of methods.

A call computes segments laid end to end: queries `[rows, N, H]`, keys and values `[rows, G, H]`, lse `[N, rows]` in
fp32. Sources: flash_attn/flash_attn_interface.py (2.7 and later), hopper/flash_attn_interface.py (3) and
flash_attn/cute/interface.py (4) of Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Boundaries of the segments (int32, on the device) and the most rows that one has.

    If `causal`, the last query of a segment sees all its keys and each one before it one key less.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Version(ABC):
    """A generation of flash-attn. Constructing it imports it, and raises whatever that raises."""

    name: ClassVar[str]
    capabilities: ClassVar[tuple[int, ...]]
    """Major compute capabilities it has kernels for."""
    max_head_dim: ClassVar[int]

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse; what they hold for rows without keys differs between versions."""

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        scale: float,
        *,
        deterministic: bool,
    ) -> None:
        """Fill dq, dk, dv. A row whose lse is +inf has no weights."""


class Flash2(Version):
    """flash-attn 2.7 or later: Ampere and everything after it."""

    name = "flash-attn 2"
    capabilities = (8, 9, 10, 11, 12)
    max_head_dim = 256

    def __init__(self) -> None:
        self._module: Any = importlib.import_module("flash_attn.flash_attn_interface")
        # Before 2.7 windows were pairs and outputs were padded; this name came with the change.
        if not hasattr(self._module, "_wrapped_flash_attn_varlen_forward"):
            raise ImportError("flash-attn is older than 2.7: pip install -U flash-attn")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._module._flash_attn_varlen_forward(
            q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k,
            dropout_p=0.0, softmax_scale=scale, causal=segments.causal,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        scale: float,
        *,
        deterministic: bool,
    ) -> None:
        self._module._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *grads, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k,
            dropout_p=0.0, softmax_scale=scale, causal=segments.causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=deterministic,
        )  # fmt: skip


class Flash3(Version):
    """flash-attn 3: Hopper."""

    name = "flash-attn 3"
    capabilities = (9,)
    max_head_dim = 256

    def __init__(self) -> None:
        self._module: Any = importlib.import_module("flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        # By position up to `causal`, because its builds differ in names and in which arguments have defaults.
        out, lse, *_ = self._module._flash_attn_forward(
            q, k, v, *[None] * 4, segments.cu_q, segments.cu_k, *[None] * 3, segments.max_q, segments.max_k,
            *[None] * 9, scale, segments.causal,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        scale: float,
        *,
        deterministic: bool,
    ) -> None:
        self._module._flash_attn_backward(
            dout, q, k, v, out, lse, segments.cu_q, segments.cu_k, None, None, segments.max_q, segments.max_k,
            *grads, scale, segments.causal, deterministic=deterministic,
        )  # fmt: skip


class Flash4(Version):
    """flash-attn 4 (CuTe): Hopper and data-centre Blackwell, compiled when first called."""

    name = "flash-attn 4"
    capabilities = (9, 10, 11)
    max_head_dim = 128

    def __init__(self) -> None:
        self._module: Any = importlib.import_module("flash_attn.cute.interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._module._flash_attn_fwd(
            q, k, v, cu_seqlens_q=segments.cu_q, cu_seqlens_k=segments.cu_k, max_seqlen_q=segments.max_q,
            max_seqlen_k=segments.max_k, softmax_scale=scale, causal=segments.causal, return_lse=True,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        scale: float,
        *,
        deterministic: bool,
    ) -> None:
        dq, dk, dv = grads
        self._module._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=segments.causal, cu_seqlens_q=segments.cu_q,
            cu_seqlens_k=segments.cu_k, max_seqlen_q=segments.max_q, max_seqlen_k=segments.max_k,
            deterministic=deterministic, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip


VERSIONS: tuple[type[Version], ...] = (Flash4, Flash3, Flash2)
"""Newest first."""


@lru_cache(maxsize=1)
def installed() -> tuple[tuple[Version, ...], tuple[str, ...]]:
    """The versions that can be imported, newest first, and of those that are there but broken the reason."""
    working: list[Version] = []
    broken: list[str] = []
    for version in VERSIONS:
        try:
            working.append(version())
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a build for another torch or another CUDA fails in any way it likes
            broken.append(f"{version.name} is broken: {str(error).splitlines()[0] if str(error) else repr(error)}")
    return tuple(working), tuple(broken)
