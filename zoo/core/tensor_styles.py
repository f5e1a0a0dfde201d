"""Whether a plan says rightly which modules work on the residual and which on heads, judged by a model on meta.

A wrong style does not fail: it leaves a gradient unsummed, or sums it twice. So it is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from zoo.core.contracts import ParallelPlan
from zoo.core.errors import LayoutError
from zoo.core.seams import find_modules


def check_styles(
    model: nn.Module, plan: ParallelPlan, *, name: str, hidden_size: int, head_dims: Collection[int], every: bool
) -> None:
    """Compare the styles `sequence` and `heads` with the shapes of parameters. Raises LayoutError.

    What works on the residual has a parameter with a dim of the hidden size, what works on heads one with a dim of the
    head size. With `every` each module with parameters must be named.
    """
    widths = {"sequence": ("the hidden size", {hidden_size}), "heads": ("the head size", set(head_dims))}
    for glob, style in plan.tensor.items():
        if style in widths:
            what, allowed = widths[style]
            for module in find_modules(model, glob):
                _check_width(f"{name}: the plan calls '{module}' {style}", model.get_submodule(module), what, allowed)
    if every:
        _check_named(model, plan, name)


def _check_width(said: str, module: nn.Module, what: str, allowed: Collection[int]) -> None:
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    # A single number has no width: of it the plan alone knows.
    wide = [shape for shape in shapes if any(size > 1 for size in shape)]
    if wide and not any(size in allowed for shape in wide for size in shape):
        sizes, found = " or ".join(map(str, sorted(allowed))), ", ".join(str(list(shape)) for shape in wide)
        raise LayoutError(
            f"{said}, and no dim of its parameters ({found}) is {what}, {sizes}: in a plan `sequence` is what works on "
            f"the residual, `heads` what works on each head"
        )


def _check_named(model: nn.Module, plan: ParallelPlan, name: str) -> None:
    named = {module for glob in (*plan.tensor, *plan.expert) for module in find_modules(model, glob)}
    for module, held in model.named_modules():
        if module not in named and any(True for _ in held.parameters(recurse=False)):
            raise LayoutError(
                f"--tp with layout.sequence_parallel=false must know whether '{module}' of {name} works on the "
                f"residual or on heads; its plan must name it in 'tensor', as `sequence` or as `heads`"
            )
