"""What attention is asked to compute: shape of heads, device, type. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """The heads of one attention layer, as a rank holds them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """From the hub's fields of a config whose layers are all alike."""
        return cls(
            num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim
        )

    def over(self, degree: int) -> HeadShape:
        """What a rank holds where heads are dealt out over so many ranks; all where that is not possible."""
        if self.num_heads % degree or self.num_kv_heads % degree:
            return self
        return replace(self, num_heads=self.num_heads // degree, num_kv_heads=self.num_kv_heads // degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """What an attention backend is asked to compute, for `supports`."""

    device: str
    """torch device type: `cpu`, `cuda`."""
    dtype: str
    """`float64`, `float32`, `bfloat16`, `float16`."""
    head_dim: int
    num_heads: int
    num_kv_heads: int
    deterministic: bool = False
    """Whether gradients must have the same bits each time."""

    @property
    def heads(self) -> HeadShape:
        return HeadShape(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def of(self, heads: HeadShape) -> AttentionProblem:
        """The same with other heads."""
        return replace(self, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim)
