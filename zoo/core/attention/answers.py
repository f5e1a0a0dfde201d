"""What kernels and context schemes return, looked at once for each object and method, in its first call.

Only shape, type and device of a tensor are read, so no device is waited for.
Shape letters: B rows, T query tokens, S key tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from zoo.core.contracts.attention import ContextScheme, HeadShape, Stage
from zoo.core.registry.answers import is_count, shown, wrong
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

_WIDE = (torch.float32, torch.float64)
_PROBED_RANKS = 8
"""Up to so many ranks the plans of all are compared with the mask: some milliseconds."""

_seen: dict[tuple[int, str], object] = {}
"""Objects by id and method. They are kept, so that no other object gets their id."""


def is_first(owner: object, method: str) -> bool:
    """Return whether no answer of this method was looked at yet."""
    return (id(owner), method) not in _seen


def check_attention(backend: Any, method: str, answer: object, q: Tensor) -> None:
    """Compare out and lse of a kernel with its queries `[B, N, T, H]`."""
    who = f"attention backend '{backend.name}'"
    says = f"out {list(q.shape)} in {_name(q)} or wider and lse {list(q.shape[:3])} in float32 or wider, on {q.device}"
    if not _are_tensors(answer, 2):
        raise wrong(who, method, shown(answer), says)
    out, lse = answer
    if not _is_like(out, q):
        raise wrong(who, method, f"out {shown(out)}", says)
    if (lse.shape, lse.device) != (q.shape[:3], q.device) or lse.dtype not in _WIDE:
        raise wrong(who, method, f"lse {shown(lse)}", says)
    _seen[id(backend), method] = backend


def check_gradients(owner: Any, who: str, method: str, answer: object, inputs: Sequence[Tensor]) -> None:
    """Compare dq, dk, dv of a kernel or scheme with q, k, v."""
    shapes = ", ".join(f"d{name} {list(x.shape)}" for name, x in zip("qkv", inputs, strict=True))
    says = f"{shapes}, in {_name(inputs[0])} or in float32 or wider, on {inputs[0].device}"
    if not _are_tensors(answer, 3):
        raise wrong(who, method, shown(answer), says)
    for name, grad, x in zip("qkv", answer, inputs, strict=True):
        if not _is_like(grad, x):
            raise wrong(who, method, f"d{name} {shown(grad)}", says)
    _seen[id(owner), method] = owner


def check_exchanged(scheme: ContextScheme, answer: object, q: Tensor) -> None:
    """Compare what a scheme's forward gave with this rank's queries `[B, N, T, H]`."""
    who = f"context scheme '{scheme.name}'"
    says = f"out {list(q.shape)} in {_name(q)} on {q.device}, and a tuple of tensors that ends with out and lse"
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise wrong(who, "forward", shown(answer), says)
    out, saved = answer
    if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise wrong(who, "forward", f"out {shown(out)}", says)
    if not isinstance(saved, tuple) or len(saved) < 2 or not all(isinstance(x, Tensor) for x in saved):
        raise wrong(who, "forward", f"for backward {shown(saved)}", says)
    if saved[-1].shape != saved[-2].shape[:-1] or saved[-1].dtype not in _WIDE:
        raise wrong(who, "forward", f"for backward {shown(saved[-2:])}", says)
    _seen[id(scheme), "forward"] = scheme


def check_plan(scheme: ContextScheme, plan: object) -> None:
    """Look at a scheme's plan as far as zoo reads it."""
    if not callable(getattr(plan, "stages", None)):
        raise wrong(f"context scheme '{scheme.name}'", "plan", shown(plan), "a ContextPlan, which has stages")
    _seen[id(scheme), "plan"] = scheme


def stages_of(scheme: ContextScheme, plan: Any, value_bytes: int, gradient_bytes: int) -> Any:
    """Ask a scheme's plan for its stages, forward and backward."""
    check_plan(scheme, plan)
    answer, who = plan.stages(value_bytes, gradient_bytes), f"context scheme '{scheme.name}'"
    says = "stages forward and stages backward, each a tuple of Stage with counts that are at least 0"
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise wrong(who, "plan.stages", shown(answer), says)
    for way in answer:
        if not isinstance(way, tuple | list) or not way:
            raise wrong(who, "plan.stages", shown(way), says)
        for stage in way:
            if not isinstance(stage, Stage) or not is_count(stage.sent) or not is_count(stage.scores):
                raise wrong(who, "plan.stages", repr(stage), says)
    return answer


def check_cover(scheme: ContextScheme, mask: Mask, degree: int, heads: HeadShape) -> None:
    """Compare the scores that all ranks plan to compute with those that the mask lets see, each of them once.

    A plan that misses keys, or sees some twice, gives other numbers than one rank would, and nothing else shows it.
    """
    who, visible = f"context scheme '{scheme.name}'", mask.area * heads.num_heads
    splits_rows: object = getattr(scheme, "splits_rows", None)
    if not isinstance(splits_rows, bool):
        raise wrong(who, "its splits_rows", shown(splits_rows), "True or False", verb="is")
    if degree > _PROBED_RANKS:
        return
    layout = SequenceLayout.contiguous(mask.length, degree)
    plans = [scheme.plan(mask, layout, rank, heads) for rank in range(degree)]
    stages = [stages_of(scheme, plan, 2, 4) for plan in plans]
    for way, name in enumerate(("forward", "backward")):
        if len({len(ways[way]) for ways in stages}) > 1:
            counts = ", ".join(str(len(ways[way])) for ways in stages)
            raise wrong(who, "plan.stages", f"{counts} stages {name} on {degree} ranks", "as many on every rank")
        scores = sum(stage.scores for ways in stages for stage in ways[way])
        if scores != visible:
            says = f"every visible pair once: {visible:,} over {degree} ranks for a row of {mask.length:,} tokens"
            raise wrong(who, "plan", f"plans that compute {scores:,} scores {name}", says)


def _are_tensors(answer: object, count: int) -> TypeGuard[Sequence[Tensor]]:
    return isinstance(answer, tuple | list) and len(answer) == count and all(isinstance(x, Tensor) for x in answer)


def _is_like(found: Tensor, x: Tensor) -> bool:
    return (found.shape, found.device) == (x.shape, x.device) and found.dtype in (x.dtype, *_WIDE)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
