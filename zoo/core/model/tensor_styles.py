"""Whether a plan says rightly which modules work on the residual and which on heads, judged by a model on meta.

A wrong style does not fail: it leaves a gradient unsummed, or sums it twice. So it is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from zoo.core.contracts.globs import find_modules
from zoo.core.contracts.models import ParallelPlan


def style_objection(
    model: nn.Module, plan: ParallelPlan, *, name: str, hidden_size: int, head_dims: Collection[int]
) -> str | None:
    """Return why a style `sequence` or `heads` contradicts the shapes of parameters, or None.

    What works on the residual has a parameter with a dim of the hidden size, what works on heads one with a dim of the
    head size.
    """
    widths = {"sequence": ("the hidden size", {hidden_size}), "heads": ("the head size", set(head_dims))}
    for glob, style in plan.tensor.items():
        if style in widths:
            what, allowed = widths[style]
            for module in find_modules(model, glob):
                said = _wrong_width(model.get_submodule(module), what, allowed)
                if said:
                    return f"{name}: the plan calls '{module}' {style}, and {said}"
    return None


def _wrong_width(module: nn.Module, what: str, allowed: Collection[int]) -> str | None:
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    # A single number has no width: of it the plan alone knows.
    wide = [shape for shape in shapes if any(size > 1 for size in shape)]
    if not wide or any(size in allowed for shape in wide for size in shape):
        return None
    sizes, found = " or ".join(map(str, sorted(allowed))), ", ".join(str(list(shape)) for shape in wide)
    return (
        f"no dim of its parameters ({found}) is {what}, {sizes}: in a plan `sequence` is what works on the residual, "
        f"`heads` what works on each head"
    )


def unnamed_module(model: nn.Module, plan: ParallelPlan) -> str | None:
    """Return the first module with parameters that neither `tensor` nor `expert` of a plan names, or None."""
    named = {module for glob in (*plan.tensor, *plan.expert) for module in find_modules(model, glob)}
    having = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    return next((name for name in having if name not in named), None)
