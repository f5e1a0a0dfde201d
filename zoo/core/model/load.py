"""Weights from a source into a model: each rank reads its own slices, straight into its storage, strictly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from zoo.core.contracts.weights import Index, Rule, Shape, TensorSource
from zoo.core.model.inventory import blocks_of, check_same, check_tensors, tied_names
from zoo.core.model.rules import RuleBook, whole
from zoo.core.registry.answers import shown, wrong


@dataclass(frozen=True)
class ModuleSource:
    """The parameters of a module in memory, as a source in our names."""

    model: nn.Module

    def __str__(self) -> str:
        return f"the {type(self.model).__name__} in memory"

    def names(self) -> Collection[str]:
        return dict(self.model.named_parameters()).keys()

    def shape(self, name: str) -> Shape:
        return tuple(self.model.get_parameter(name).shape)

    def dtype(self, name: str) -> str:
        return str(self.model.get_parameter(name).dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        return ""

    def read(self, name: str, index: Index, buffer: Tensor | None = None) -> Tensor:
        return self.model.get_parameter(name).detach()[index]


@torch.no_grad()
def load_into(
    model: nn.Module, source: TensorSource, rules: Sequence[Rule], *, whole_model: nn.Module | None = None
) -> None:
    """Fill every parameter of a model from a source in hub names; an empty `rules` takes the model's own names.

    Parameters may be plain or DTensors with any Shard and Replicate placements (FSDP2's strided ones over an evenly cut
    dim too): only this rank's slice is read, in blocks, and cast to the parameter's dtype. Where `model` is a part of
    another, `whole_model` is that one, on meta: the source must fit it. Raises DataError if a tensor is missing, left
    over, of another shape, or if two tied tensors differ.
    """
    every = model if whole_model is None else whole_model
    tied = tied_names(every)
    parameters = dict(model.named_parameters())
    book = RuleBook(rules, {name: tuple(parameter.shape) for name, parameter in every.named_parameters()})
    aliases = [name for name in tied if name in source.names()]
    check_tensors(source, book.hub_shapes, allowed=aliases)
    ours = book.to_ours(source)
    for name, parameter in parameters.items():
        local, index = _local(parameter)
        for here, there in blocks_of(index):
            place = local[here]
            place.copy_(_sized(source, name, ours.read(name, there), place.shape))
    for alias in (a for a in aliases if tied[a] in parameters):
        check_same(source, alias, book.pieces[tied[alias]][0].hub, _local(parameters[tied[alias]])[1])


def _sized(source: TensorSource, name: str, piece: Tensor, shape: torch.Size) -> Tensor:
    """Return a piece that was read; one of another shape would be repeated until it fits."""
    if piece.shape != shape:
        raise wrong(f"{source}", f"read of {name}", shown(piece), f"a tensor {list(shape)}")
    return piece


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta storage without values. Tied parameters stay one: `to_empty` alone would part them."""
    tied = tied_names(model)
    model.to_empty(device=device)
    for alias, name in tied.items():
        module, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(name))


def _local(parameter: nn.Parameter) -> tuple[Tensor, Index]:
    """This rank's storage of a parameter and its place in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.data, whole(tuple(parameter.shape))
    for placement in parameter.placements:
        # Strided is what FSDP2 makes of a dim that `tp` has cut before: still one range a rank.
        if not isinstance(placement, Shard | Replicate | _StridedShard):
            raise TypeError(f"cannot load into a parameter placed as {placement}")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
