"""Adding one more set of keys to an attention result, by log-sum-exp.

Shape letters: B rows, N query heads, T tokens, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Change out `[B, N, T, H]` and lse `[B, N, T]` in place into the softmax over both key sets.

    Online softmax (Milakov and Gimelshein 2018): the total is a weighted mean, and both weights are exponentials of
    numbers that are never positive, so nothing overflows. A row without keys on either side has out 0 and lse -inf,
    and stays so.
    """
    total = torch.logaddexp(lse, more_lse)
    weight = (more_lse - total.masked_fill(total == -torch.inf, 0.0)).exp_()
    out.lerp_(more_out.to(out.dtype), weight.to(out.dtype).unsqueeze(-1))
    lse.copy_(total)
