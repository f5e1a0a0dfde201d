"""FSDP2 under a pipeline's schedule: microbatches overlap, so what is gathered for one must serve the others too.

Left to itself FSDP2 gives all weights up after every backward, whoever still needs them, and sends for the unit that
ran before, which may be of another stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule
from torch.distributed.fsdp import FSDPModule

from zoo import Layout
from zoo.plugins.parallel.pipeline.stage_model import StageModel


def held(
    model: nn.Module, stages: Sequence[StageModel], blocks: Sequence[Sequence[str]], layout: Layout, *, splits: bool
) -> Callable[[], AbstractContextManager[None]]:
    """What a step of a schedule runs in. `blocks` are those of each stage of this rank, `splits` as a Schedule's.

    Weights that an adapter keeps for a step are gathered once, and gradients that it keeps are summed at the end of it;
    so are all under a schedule that splits, for FSDP2 acts when gradients of inputs are there, too soon. Else the root
    is gathered once, for all stages pass by it, and the other units as `layout.reshard` says; shards of gradients add
    up on their rank, and copies meet in a stage's last backward.
    """
    if not isinstance(model, FSDPModule):
        return nullcontext
    if splits or layout.keeps_weights_for_a_step:
        return lambda: _once(model)
    model.set_reshard_after_backward(False, recurse=not layout.settings.reshard)
    _prefetch(model, blocks)
    for stage, names in zip(stages, blocks, strict=True):
        stage.before_last_backward = partial(_let_copies_meet, model, names, is_end=stage.is_first or stage.is_last)
    return lambda: _given_up_at_last(model)


def _let_copies_meet(model: FSDPModule, blocks: Sequence[str], *, is_end: bool) -> None:
    """All-reduce gradients of this stage's blocks, and of the root unit if the stage holds embedding or head."""
    assert isinstance(model, nn.Module)
    for name in blocks:
        _units(model.get_submodule(name))[0].set_requires_all_reduce(True)
    if is_end:
        model.set_requires_all_reduce(True, recurse=False)


@contextmanager
def _once(model: FSDPModule) -> Iterator[None]:
    # Replicated weights stay anyway, and refuse to be told.
    if not isinstance(model, ReplicateModule):
        model.set_reshard_after_forward(False)
    _sum_gradients(model, False)
    yield
    _sum_gradients(model, True)
    # What autograd would call after a last backward, as torch's own stages do it.
    model._get_fsdp_state()._root_post_backward_final_callback()


def _sum_gradients(model: FSDPModule, now: bool) -> None:
    model.set_is_last_backward(now)
    model.set_reshard_after_backward(now)
    model.set_requires_gradient_sync(now)


@contextmanager
def _given_up_at_last(model: FSDPModule) -> Iterator[None]:
    model.set_requires_all_reduce(False)
    yield
    assert isinstance(model, nn.Module)
    for unit in _units(model):
        unit.reshard()


def _prefetch(model: FSDPModule, stages: Sequence[Sequence[str]]) -> None:
    """In backward a unit sends for the one that ran before it; the first of a stage for itself, which is there."""
    assert isinstance(model, nn.Module)
    for blocks in filter(None, stages):
        first = _units(model.get_submodule(blocks[0]))[-1]
        first.set_modules_to_backward_prefetch([first])
    if len(stages) > 1:
        model.set_modules_to_backward_prefetch([model])


def _units(module: nn.Module) -> list[FSDPModule]:
    """The module's units, itself before those inside."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
