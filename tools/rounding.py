"""What arithmetic in a narrow type may be off by, worked out in fp64 from the data: a bound for any processor.

Two correct programs add the same numbers in another order on another processor, and differ. How far from the truth
either may be does not depend on the other; it follows from the data. Every operation rounds by up to half a unit in
the last place of its result, a sum of n numbers by about sqrt(n) of those of the sum of their sizes, in whatever order
(Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019), and what follows carries that on.

    share = rounding(step, torch.float32)          # step: a function to a dict of tensors, computed in fp64
    for name, value in step().items():
        assert share(name, found[name]) <= 1

`Rounded` carries it on by doing it: it moves the result of every operation at random by up to that much (Parker, "Monte
Carlo arithmetic", 1997), in fp64, where the processor's own rounding is a billion times less. The draws are seeded, so
the bound is the same number everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 3.0
"""Times what was drawn: an error of few directions may be larger than one draw of it. Of gradients of 144 models, ours
and transformers', on three instruction sets, the largest used a third of the whole, and most a twentieth."""

_EXACT = """
clone copy _to_copy where masked_fill index index_select gather cat stack select_scatter neg abs amax amin max min topk
sort fill zero zeros zeros_like ones ones_like empty empty_like empty_strided full full_like scalar_tensor lift_fresh
arange scatter embedding constant_pad_nd repeat flip tril triu clamp new_zeros new_empty new_full new_empty_strided
new_ones
"""
EXACT = frozenset(_EXACT.split())
"""Operations that move numbers and make none, as views do."""


class Rounded(TorchDispatchMode):
    """fp64 arithmetic that is off by as much as that of a narrower type may be; sums are kept in `sums`."""

    def __init__(self, dtype: torch.dtype, sums: torch.dtype, seed: int) -> None:
        super().__init__()
        self._unit, self._unit_of_sums = (torch.finfo(each).eps / 2 for each in (dtype, sums))
        self._draw = torch.Generator().manual_seed(seed)
        self._parts = core_aten_decompositions()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::").rstrip("_")
        if func in self._parts and name not in SUMS:
            with self:
                return self._parts[func](*args, **kwargs)
        adds = name in SUMS and args[0].is_floating_point()
        sizes = SUMS[name](*args, **kwargs) if adds else None
        result = func(*args, **kwargs)
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor) and part.dtype == torch.float64 and not _exact(func, name, part, args):
                by = part.abs() * self._unit
                self._move(part, by if sizes is None else by.add_(sizes, alpha=self._unit_of_sums))
        return result

    def _move(self, x: Tensor, by: Tensor) -> None:
        noise = torch.rand(x.shape, generator=self._draw, dtype=torch.float64).mul_(2).sub_(1).mul_(by)
        x.add_(noise.nan_to_num_(0.0, 0.0, 0.0))


def _exact(func: Any, name: str, result: Tensor, args: tuple[Any, ...]) -> bool:
    if name in EXACT:
        return True
    tensors = (each for each in args if isinstance(each, Tensor))
    return not func._schema.is_mutable and any(torch._C._is_alias_of(result, each) for each in tensors)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return (a.abs() @ b.abs()).mul_(math.sqrt(max(1, a.shape[-1])))


def _total(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    total = x.abs().sum(dim or list(range(x.ndim)), keepdim=keepdim)
    return total.mul_(math.sqrt(x.numel() / max(1, total.numel())))


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    total = _total(x, dim, keepdim)
    return total.mul_(total.numel() / max(1, x.numel()))


SUMS: Mapping[str, Callable[..., Tensor]] = {
    "mm": lambda a, b, **_: _products(a, b),
    "bmm": lambda a, b, **_: _products(a, b),
    "addmm": lambda bias, a, b, **_: _products(a, b) + bias.abs(),
    "baddbmm": lambda bias, a, b, **_: _products(a, b) + bias.abs(),
    "addcmul": lambda x, a, b, **_: x.abs() + (a * b).abs(),
    "sum": _total,
    "mean": _mean,
}
"""Operations that add, to the sum of the sizes of what they add, times sqrt(n)."""


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """torch's attention as the operators that it consists of."""
    fused = torch.backends.cuda.flash_sdp_enabled()  # of CPUs too
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(fused)


def rounding(
    step: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype, *, sums: torch.dtype | None = None
) -> Callable[[str, Tensor], float]:
    """A function from the name and the value of a result to how much of what `dtype` may be off by it is off by.

    `step` computes all results in fp64, the same at every call. `sums` is the type that sums are kept in, if it is
    another.
    """
    with _attention_in_parts():
        truth = {name: value.detach().clone() for name, value in step().items()}
        with Rounded(dtype, sums or dtype, seed=0):
            moved = {name: value.detach().clone() for name, value in step().items()}
    allowed = {name: MARGIN * (moved[name] - truth[name]).norm().item() for name in truth}

    def share(name: str, value: Tensor) -> float:
        off = (value.detach().double() - truth[name]).norm().item()
        return off / allowed[name] if allowed[name] else (math.inf if off else 0.0)

    return share
