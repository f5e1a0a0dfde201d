"""Where a value first stopped being finite: forward hooks on every module, for a step that is computed once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(slots=True)
class Trace:
    """What was found on this rank; `events` counts looks, so that the first of several ranks can be told."""

    events: int = 0
    found: tuple[int, str] | None = None
    """When, and in words where."""
    handles: list[Any] = field(default_factory=list)

    def look(self, value: Tensor, where: str) -> None:
        """Note the first value that is not finite."""
        self.events += 1
        if self.found is None and not _is_finite(value):
            self.found = (self.events, where)


@contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Inside `with`, weights, then inputs and outputs of every module, then their gradients, are looked at.

    Modules inside others end first, so the module named is the innermost one. Reads every value on the host: slow.
    """
    trace = Trace()
    for name, parameter in model.named_parameters():
        trace.look(parameter, f"in the weight {name}")
    for name, module in model.named_modules():
        trace.handles.append(module.register_forward_pre_hook(partial(_entered, trace, name), with_kwargs=True))
        trace.handles.append(module.register_forward_hook(partial(_left, trace, name)))
    try:
        yield trace
    finally:
        for handle in trace.handles:
            handle.remove()


def first_of_ranks(trace: Trace) -> str:
    """Where it began, over all ranks: the earliest look, then the lowest rank; collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trace.found)
    found = sorted((found[0], rank, found[1]) for rank, found in enumerate(everyone) if found is not None)
    if not found:
        return "computed once more, every module's values and gradients were finite"
    _, rank, where = found[0]
    return f"it first appeared {where}" + (f" on rank {rank}" if len(everyone) > 1 else "")


def _entered(trace: Trace, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What enters a module and no module before it gave was made between them: a sum, a rotation."""
    for value in _tensors((args, kwargs)):
        trace.look(value, f"in the input of {_called(name)}")
        _look_back(trace, value, f"in the backward of {_called(name)}")


def _left(trace: Trace, name: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    for value in _tensors(output):
        trace.look(value, f"in the output of {_called(name)}")
        _look_back(trace, value, f"in the gradient of the output of {_called(name)}")


def _look_back(trace: Trace, value: Tensor, where: str) -> None:
    """Look at a gradient when backward comes to it: that of an output before that of the module's inputs."""
    if value.requires_grad:
        hook: Callable[[Tensor], None] = partial(_looked, trace, where)
        trace.handles.append(value.register_hook(hook))  # type: ignore[no-untyped-call]


def _looked(trace: Trace, where: str, gradient: Tensor) -> None:
    trace.look(gradient, where)


def _called(name: str) -> str:
    return name or "the model"


def _is_finite(value: Tensor) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return not local.is_floating_point() or bool(local.detach().isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
