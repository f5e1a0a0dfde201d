"""Weights from a source into a model: each rank reads its own slices, straight into its storage, strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.overrides import TorchFunctionMode

from zoo.core.contracts import ModelSpec, TensorSource
from zoo.core.errors import DataError
from zoo.core.rules import Index, Rule, RuleBook, Shape, row_blocks, whole

IGNORABLE = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry and no model reads."""

BLOCK_VALUES = 1 << 22
"""Values that are read at a time, so that a load needs little more than the model itself."""


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

    def read(self, name: str, index: Index) -> Tensor:
        return self.model.get_parameter(name).detach()[index]


@torch.no_grad()
def load_into(model: nn.Module, source: TensorSource, rules: Sequence[Rule]) -> None:
    """Fill every parameter of a model from a source in hub names; an empty `rules` takes the model's own names.

    Parameters may be plain or DTensors with any Shard and Replicate placements: only this rank's slice is read,
    in blocks, and cast to the parameter's dtype. Raises DataError if a tensor is missing, left over, of another
    shape, or if two tied tensors differ.
    """
    tied = tied_names(model)
    parameters = dict(model.named_parameters())
    book = RuleBook(rules, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    aliases = [name for name in tied if name in source.names()]
    check_tensors(source, book.hub_shapes, allowed=aliases)
    ours = book.to_ours(source)
    for name, parameter in parameters.items():
        local, index = _local(parameter)
        for here, there in _blocks(index):
            local[here].copy_(ours.read(name, there))
    for alias in aliases:
        _check_tied(source, alias, book.pieces[tied[alias]][0].hub, _local(parameters[tied[alias]])[1])


def expected_tensors(spec: ModelSpec, config: Any) -> dict[str, Shape]:
    """Hub name to shape of every tensor a checkpoint of this config has; nothing is allocated."""
    return rule_book(spec, config).hub_shapes


def rule_book(
    spec: ModelSpec, config: Any, source: TensorSource | None = None, *, model: nn.Module | None = None
) -> RuleBook:
    """The family's rules over the shapes of this config; nothing is allocated.

    With a source in hub names, those of the form whose names fit it best; without, the one that is written. `model` is
    the one of this config, where there is one already.
    """
    shapes = {name: tuple(p.shape) for name, p in (model or meta_model(spec, config)).named_parameters()}
    books = [RuleBook(rules, shapes) for rules in (spec.rules(config), *(spec.forms(config) if source else ()))]
    if source is None or len(books) == 1:
        return books[0]
    names = set(source.names())
    return min(books, key=lambda book: len(names ^ book.hub_shapes.keys()))


def rules_for(spec: ModelSpec, config: Any, source: TensorSource) -> tuple[Rule, ...]:
    """The rules of the form that a source in hub names has."""
    return tuple(rule_book(spec, config, source).rules) if spec.forms(config) else spec.rules(config)


def meta_model(spec: ModelSpec, config: Any) -> nn.Module:
    """The model without storage."""
    with torch.device("meta"), _NoInit():
        return spec.build(config)


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: on meta there is nothing to fill, and trying to takes most of the time of a build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta storage without values. Tied parameters stay one: `to_empty` alone would part them."""
    tied = tied_names(model)
    model.to_empty(device=device)
    for alias, name in tied.items():
        module, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(name))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters, to the first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def check_tensors(source: TensorSource, expected: Mapping[str, Shape], *, allowed: Collection[str] = ()) -> None:
    """Names and shapes of a source against what a model needs; `allowed` may be there too. Raises DataError."""
    names = set(source.names())
    missing = [name for name in expected if name not in names]
    if missing:
        raise DataError(f"{source} lacks {_some(missing)}, which its config.json asks for; fetch it again")
    extra = sorted(n for n in names if n not in expected and n not in allowed and not IGNORABLE.search(n))
    if extra:
        raise DataError(
            f"{source} has {_some(extra)}, for which a model of its config.json has no place; "
            f"correct config.json or remove them"
        )
    wrong = [
        f"{name} is {list(source.shape(name))} and not {list(shape)}"
        for name, shape in expected.items()
        if tuple(source.shape(name)) != tuple(shape)
    ]
    if wrong:
        raise DataError(f"{source} does not fit its config.json: {_some(wrong, '; ')}")


def check_tied(source: TensorSource, model: nn.Module, book: RuleBook) -> list[str]:
    """Names in a hub source that repeat a tied tensor, after comparing them with it whole. Raises DataError."""
    aliases = {alias: book.pieces[name][0].hub for alias, name in tied_names(model).items() if alias in source.names()}
    for alias, hub in aliases.items():
        if hub in source.names():  # else `check_tensors` says so
            _check_tied(source, alias, hub, whole(book.hub_shapes[hub]))
    return list(aliases)


def _check_tied(source: TensorSource, alias: str, hub: str, index: Index) -> None:
    same_shape = tuple(source.shape(alias)) == tuple(source.shape(hub))
    if same_shape and all(torch.equal(source.read(alias, i), source.read(hub, i)) for _, i in _blocks(index)):
        return
    raise DataError(
        f"{source}: config.json says tie_word_embeddings, but {alias} differs from {hub}; to keep both, set it to "
        f"false there or by --set model.tie_word_embeddings=false"
    )


def _local(parameter: nn.Parameter) -> tuple[Tensor, Index]:
    """This rank's storage of a parameter and its place in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.data, whole(tuple(parameter.shape))
    for placement in parameter.placements:
        if not isinstance(placement, Shard | Replicate):
            raise TypeError(f"cannot load into a parameter placed as {placement}")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


def _blocks(index: Index) -> Iterable[tuple[Index, Index]]:
    """Blocks of an index, each seen from the index and from the whole."""
    for block in row_blocks(index, values=BLOCK_VALUES):
        yield tuple(slice(b.start - i.start, b.stop - i.start) for b, i in zip(block, index, strict=True)), block


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
