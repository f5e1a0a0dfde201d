"""Which tensors a checkpoint of a config has, in each of its forms, and whether a source has them. Holds no data."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo.core.contracts.checkpoints import HubCheckpoint
from zoo.core.contracts.globs import find_modules, matches
from zoo.core.contracts.layout import ModelFacts
from zoo.core.contracts.models import CUT_STYLES, BlockShape, ModelSpec, ParallelPlan
from zoo.core.contracts.values import ModelValues, Values
from zoo.core.contracts.weights import Index, Rule, Shape, TensorSource
from zoo.core.errors import DataError
from zoo.core.model.answers import built, checked_rules, told
from zoo.core.model.misfit import why_names_differ
from zoo.core.model.rules import RuleBook, row_blocks, whole
from zoo.core.model.tensor_styles import style_objection, unnamed_module

IGNORABLE = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry and no model reads."""

MAX_TENSORS = 80_000
"""Of a checkpoint; the largest that are published have some 70,000."""

BLOCK_VALUES = 1 << 22
"""Values that are read at a time, so that a load needs little more than the model itself."""


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
    forms = (spec.rules(config), *(spec.forms(config) if source else ()))
    books = [checked_rules(spec, rules, shapes) for rules in forms]
    if source is None or len(books) == 1:
        return books[0]
    names = set(source.names())
    return min(books, key=lambda book: len(names ^ book.hub_shapes.keys()))


def checked_book(checkpoint: HubCheckpoint, spec: ModelSpec, config: Any) -> RuleBook:
    """Return the rules of the form a checkpoint has, once its tensors are those of a config by name and shape.

    Raises DataError with the cause: a setting that would make them fit, a prefix, or the names themselves.
    """
    _check_layers(checkpoint, config)
    model, tensors = meta_model(spec, config), checkpoint.tensors
    book = rule_book(spec, config, None if checkpoint.own_names else tensors, model=model)
    expected = book.shapes if checkpoint.own_names else book.hub_shapes
    aliases = [] if checkpoint.own_names else check_tied(tensors, model, book)
    try:
        check_tensors(tensors, expected, allowed=aliases)
    except DataError as error:
        cause = _second_name_only(tensors, model, book) or _setting_that_fits(tensors, spec, config)
        if checkpoint.own_names or cause is None:
            raise
        raise DataError(f"{error}; or {cause}") from None
    return book


def _check_layers(checkpoint: HubCheckpoint, config: Any) -> None:
    """Before a model is built, if only on meta: a small file must not ask for a large one."""
    layers, experts = getattr(config, "num_hidden_layers", 0), getattr(config, "num_local_experts", 1)
    tensors, file = len(checkpoint.tensors.names()), checkpoint.path / "config.json"
    if layers > tensors:
        raise DataError(
            f"num_hidden_layers is {layers}, and {checkpoint.path} has only {tensors} tensors in all; correct it, "
            f"in config.json or in --set, or fetch the weights again"
        )
    # Stacked, a few tensors could ask for a million of them one by one, three to an expert.
    if layers * experts > MAX_TENSORS // 3:
        raise DataError(f"{file}: {layers} layers of {experts} experts are more than the {MAX_TENSORS // 3} allowed")


def _second_name_only(source: TensorSource, model: nn.Module, book: RuleBook) -> str | None:
    """What to do if all that a source lacks are tied tensors that it has under their second names."""
    second = {book.pieces[name][0].hub: alias for alias, name in tied_names(model).items() if alias in source.names()}
    missing = [hub for hub in book.hub_shapes if hub not in source.names()]
    if not missing or any(hub not in second for hub in missing):
        return None
    return (
        f"{missing[0]} is there under its second name only, {second[missing[0]]}, as a save that keeps one of two tied "
        f'names leaves it; write it out again: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{source}').save_pretrained('NEW')\""
    )


def _setting_that_fits(source: TensorSource, spec: ModelSpec, config: Any) -> str | None:
    """What to set in config.json so that a source fits it, if one field is all that is wrong."""
    for field, value in _other_settings(source, spec, config):
        try:
            other = spec.parse(spec.override(spec.hub_config(config), {field: value}))
            book = rule_book(spec, other, source)
            check_tensors(source, book.hub_shapes, allowed=check_tied(source, meta_model(spec, other), book))
        except DataError:
            continue
        said = json.dumps(value)
        return (
            f"its tensors are those of a model with {field} {said}, and its config.json says "
            f"{json.dumps(getattr(config, field))}: write {said} there, or train with --set model.{field}={said}"
        )
    return None


def _other_settings(source: TensorSource, spec: ModelSpec, config: Any) -> Iterable[tuple[str, Any]]:
    """Fields that are often wrong, and the value that the tensors may mean."""
    tied = getattr(config, "tie_word_embeddings", None)
    if tied is not None:
        yield "tie_word_embeddings", not tied
    shapes = rule_book(spec, config, source).hub_shapes
    rows = {
        source.shape(name)[0]
        for name, shape in shapes.items()
        if name in source.names() and len(shape) == 2 and shape[0] == config.vocab_size and source.shape(name)
    }
    if len(rows) == 1 and rows != {config.vocab_size}:
        yield "vocab_size", rows.pop()


def model_facts(name: str, spec: ModelSpec, config: Any) -> ModelFacts:
    """Return what a layout must know of a model; nothing is allocated. Raises UsageError if a glob matches nothing."""
    model = meta_model(spec, config)
    said = told(spec, config, model)
    plan = said.plan
    blocks, last_values = block_shapes(model, plan)
    head_dims = {heads.head_dim for heads in said.heads}
    return ModelFacts(
        name=name,
        config=config,
        layer_heads=said.heads,
        layer_windows=said.windows,
        experts=said.experts,
        widths=cut_widths(spec, config, model=model),
        style_objection=style_objection(model, plan, name=name, hidden_size=config.hidden_size, head_dims=head_dims),
        unnamed_module=unnamed_module(model, plan),
        blocks=blocks,
        last_values=last_values,
        values=model_values(model, plan),
    )


def cut_widths(spec: ModelSpec, config: Any, *, model: nn.Module | None = None) -> list[tuple[str, int]]:
    """What the plan's `tensor` cuts, as globs, and the length of the dim that is cut, each once; nothing is allocated.

    Raises UsageError if a glob matches nothing.
    """
    model = model or meta_model(spec, config)
    found: dict[tuple[str, int], None] = {}
    for glob, style in spec.plan(config).tensor.items():
        if style in CUT_STYLES:
            weights = (model.get_submodule(name).get_parameter("weight") for name in find_modules(model, glob))
            found |= dict.fromkeys((glob, weight.shape[1 if style == "rowwise" else 0]) for weight in weights)
    return list(found)


def model_values(model: nn.Module, plan: ParallelPlan) -> ModelValues:
    """How many values each block and the rest have, by what may cut them. A tied parameter counts once."""
    blocks = dict.fromkeys(find_modules(model, plan.block), Values())
    ends = Values()
    cut = [glob for glob, style in plan.tensor.items() if style in CUT_STYLES]
    for name, parameter in model.named_parameters():
        holders = [name[:i] for i, c in enumerate(name) if c == "."]
        if any(matches(holder, glob) for holder in holders for glob in plan.expert):
            values = Values(expert=parameter.numel())
        elif any(matches(holder, glob) for holder in holders[-1:] for glob in cut):
            values = Values(cut=parameter.numel())
        else:
            values = Values(rest=parameter.numel())
        block = next((holder for holder in holders if holder in blocks), None)
        if block is None:
            ends = ends.plus(values)
        else:
            blocks[block] = blocks[block].plus(values)
    return ModelValues(blocks=tuple(blocks.values()), ends=ends)


def block_shapes(model: nn.Module, plan: ParallelPlan) -> tuple[tuple[BlockShape, ...], int]:
    """The blocks in order, and the matrix values of what only the last stage of a pipeline needs."""
    seams = {seam: find_modules(model, glob) for seam, glob in plan.seams.items()}
    blocks = tuple(
        BlockShape(
            matrix_values=matrix_values(model.get_submodule(block)),
            seams=frozenset(s for s, names in seams.items() if any(n.startswith(f"{block}.") for n in names)),
        )
        for block in find_modules(model, plan.block)
    )
    return blocks, sum(
        matrix_values(model.get_submodule(name)) for glob in plan.last for name in find_modules(model, glob)
    )


def matrix_values(module: nn.Module) -> int:
    """Return how many values the matrices of a module have: a token costs that many multiplications."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def rules_for(spec: ModelSpec, config: Any, source: TensorSource) -> tuple[Rule, ...]:
    """The rules of the form that a source in hub names has."""
    return tuple(rule_book(spec, config, source).rules) if spec.forms(config) else spec.rules(config)


def meta_model(spec: ModelSpec, config: Any) -> nn.Module:
    """The model without storage."""
    with torch.device("meta"), _NoValues():
        return built(spec, config)


class _NoValues(TorchFunctionMode):
    """Skips drawing values: on meta torch does it in Python, for which it first imports its compiler."""

    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters, to the first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def check_tensors(source: TensorSource, expected: Mapping[str, Shape], *, allowed: Collection[str] = ()) -> None:
    """Names and shapes of a source against what a model needs; `allowed` may be there too. Raises DataError."""
    names = set(source.names())
    missing = [name for name in expected if name not in names]
    cause = why_names_differ(source, names, [*expected, *allowed]) if missing else None
    if cause is not None:
        raise DataError(cause)
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
            check_same(source, alias, hub, whole(book.hub_shapes[hub]))
    return list(aliases)


def check_same(source: TensorSource, alias: str, hub: str, index: Index) -> None:
    """That a tied tensor and its repetition agree where an index says. Raises DataError."""
    same_shape = tuple(source.shape(alias)) == tuple(source.shape(hub))
    if same_shape and all(torch.equal(source.read(alias, i), source.read(hub, i)) for _, i in blocks_of(index)):
        return
    raise DataError(
        f"{source}: config.json says tie_word_embeddings, but {alias} differs from {hub}; to keep both, set it to "
        f"false there or by --set model.tie_word_embeddings=false"
    )


def blocks_of(index: Index) -> Iterable[tuple[Index, Index]]:
    """Blocks of an index, each seen from the index and from the whole."""
    for block in row_blocks(index, values=BLOCK_VALUES):
        yield tuple(slice(b.start - i.start, b.stop - i.start) for b, i in zip(block, index, strict=True)), block


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
