"""What a model family says and its model returns, compared with each other before a rank starts.

A wrong answer is a PluginError of one line, as in `registry/answers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from zoo.core.contracts.attention import HeadShape
from zoo.core.contracts.entries import ModelEntry
from zoo.core.contracts.globs import find_modules, matches
from zoo.core.contracts.models import ExpertShape, Losses, ModelSpec, ParallelPlan, SeamName, TensorStyle
from zoo.core.contracts.weights import Piece, Shape
from zoo.core.errors import PluginError, did_you_mean
from zoo.core.model.rules import RuleBook
from zoo.core.registry.answers import is_count, number, shown, wrong
from zoo.core.registry.catalog import Catalog

OWN_METRICS = frozenset(
    (
        *("step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_s", "tokens_per_s_per_rank"),
        *("mem_peak_gib", "step_s", "data_s", "mfu"),
    )
)
"""Metrics that zoo writes for every step. A model's own have other names."""

_CONFIG = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
_WITH_WEIGHT = ("colwise", "rowwise", "vocab")
"""Styles that cut a matrix."""


# The spec -----------------------------------------------------------------------------------------


def loaded_spec(models: Catalog[ModelEntry], name: str) -> ModelSpec:
    """Import the spec of a family. Raises as `Catalog.load`, and PluginError if it is none."""
    spec, who = models.load(name), f"model '{name}' of plugin {models.owner(name).label}"
    if not isinstance(spec, ModelSpec):
        raise PluginError(f"{who}: its target is {shown(spec)}, and the contract says a ModelSpec; correct the plugin")
    if spec.name != name:
        raise wrong(who, "its ModelSpec", f"the name {shown(spec.name)}", f"that of the entry, {name!r}")
    data = ("name", "model_type", "optional_fields")
    plain = next((f.name for f in fields(spec) if f.name not in data and not callable(getattr(spec, f.name))), None)
    if plain is not None:
        raise wrong(who, "its ModelSpec", f"{plain} as {shown(getattr(spec, plain))}", "a function")
    return spec


def parsed(spec: ModelSpec, hub_config: Mapping[str, Any]) -> Any:
    """Ask a family for its config of a config.json. Raises what `parse` raises."""
    config = spec.parse(hub_config)
    for field in _CONFIG:
        value = getattr(config, field, None)
        if not is_count(value) or value == 0:
            came = shown(config) if not hasattr(config, field) else f"a config with {field} {shown(value)}"
            raise wrong(_family(spec.name), "parse", came, f"a config with {', '.join(_CONFIG)}, ints above 0")
    return config


def overridden(spec: ModelSpec, known: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a family for its fields with some set anew. Raises what `override` raises."""
    return _hub_fields(spec, "override", spec.override(known, over))


def hub_fields(spec: ModelSpec, config: Any) -> dict[str, Any]:
    """Ask a family for the config.json of a config."""
    return _hub_fields(spec, "hub_config", spec.hub_config(config))


def _hub_fields(spec: ModelSpec, method: str, answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict) or not all(isinstance(field, str) for field in answer):
        raise wrong(_family(spec.name), method, shown(answer), "a dict of config.json's fields")
    return answer


def built(spec: ModelSpec, config: Any) -> nn.Module:
    """Let a family build its model."""
    model: object = spec.build(config)
    if not isinstance(model, nn.Module):
        raise wrong(_family(spec.name), "build", shown(model), "an nn.Module")
    return model


def _family(name: str) -> str:
    return f"model '{name}'"


# What it says of a model --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a family says of a model, compared with the model."""

    plan: ParallelPlan
    heads: tuple[HeadShape, ...]
    """Of each attention layer."""
    windows: tuple[int | None, ...]
    experts: ExpertShape | None


def told(spec: ModelSpec, config: Any, model: nn.Module) -> Told:
    """Ask a family everything about a model on meta. A layout of one rank is told what one of many would be."""
    plan = _plan(spec, config, model)
    layers = [model.get_submodule(name) for name in find_modules(model, plan.seams["attention"])]
    heads = _of_layers(spec, "heads", spec.heads(config), len(layers), _is_shape, "a HeadShape of ints above 0")
    windows = _of_layers(
        spec, "windows", spec.windows(config), len(layers), _is_window, "None or an int above 0, the window in tokens"
    )
    for number_of, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        own = getattr(layer, "window", None)
        if own != window:
            says = f"what its module has as `window`, {shown(own)}"
            raise wrong(_family(spec.name), "windows", f"{window} for attention layer {number_of}", says)
    says = "FLOPs, a number that is at least 0"
    number(_family(spec.name), "flops_per_token", spec.flops_per_token(config, 1.0), says)
    return Told(plan=plan, heads=heads, windows=windows, experts=_experts(spec, config, model, plan))


def _plan(spec: ModelSpec, config: Any, model: nn.Module) -> ParallelPlan:
    plan, who = spec.plan(config), _family(spec.name)
    if not isinstance(plan, ParallelPlan):
        raise wrong(who, "plan", shown(plan), "a ParallelPlan")
    _check_words(who, "style", plan.tensor.values(), get_args(TensorStyle))
    _check_words(who, "seam", plan.seams, get_args(SeamName))
    if "attention" not in plan.seams:
        raise wrong(who, "plan", "no seam 'attention'", "one, for that is where zoo puts attention")
    # Walking a model takes longer than comparing its names.
    names = [name for name, _ in model.named_modules()]
    for glob in (plan.block, *plan.first, *plan.last, *plan.expert):
        _found(who, names, glob)
    for glob, style in plan.tensor.items():
        for name in _found(who, names, glob):
            if style in _WITH_WEIGHT and not isinstance(getattr(model.get_submodule(name), "weight", None), Tensor):
                raise wrong(who, "plan", f"{glob!r} as {style!r}", f"modules with a weight, and {name} has none")
    for seam, glob in plan.seams.items():
        for name in _found(who, names, glob):
            if any(True for _ in model.get_submodule(name).parameters()):
                raise wrong(
                    who, "plan", f"{glob!r} as seam {seam!r}", f"modules without parameters, and {name} has some"
                )
    return plan


def _check_words(who: str, what: str, given: Iterable[str], known: Sequence[str]) -> None:
    for word in given:
        if word not in known:
            near = did_you_mean(str(word), known)
            says = f"one of {', '.join(known)}{f' ({near})' if near else ''}"
            raise wrong(who, "plan", f"the {what} {shown(word)}", says)


def _found(who: str, names: Sequence[str], glob: object) -> list[str]:
    if not isinstance(glob, str):
        raise wrong(who, "plan", f"the glob {shown(glob)}", "a text such as 'model.layers.*'")
    found = [name for name in names if matches(name, glob)]
    if not found:
        raise wrong(who, "plan", f"the glob '{glob}'", "globs that match a module each, and it matches none")
    return found


def _of_layers(
    spec: ModelSpec, method: str, answer: object, layers: int, fits: Callable[[object], bool], says: str
) -> tuple[Any, ...]:
    """Return what a family says of each of its attention layers."""
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise wrong(_family(spec.name), method, shown(answer), f"a sequence, for each attention layer {says}")
    odd = [one for one in answer if not fits(one)]
    if odd:
        raise wrong(_family(spec.name), method, repr(odd[0]), says)
    if len(answer) != layers:
        raise wrong(
            _family(spec.name), method, f"{len(answer)} entries", f"one for each attention layer, and it has {layers}"
        )
    return tuple(answer)


def _is_shape(one: object) -> bool:
    return isinstance(one, HeadShape) and all(
        is_count(n) and n > 0 for n in (one.num_heads, one.num_kv_heads, one.head_dim)
    )


def _is_window(one: object) -> bool:
    return one is None or (is_count(one) and one != 0)


def _experts(spec: ModelSpec, config: Any, model: nn.Module, plan: ParallelPlan) -> ExpertShape | None:
    shape, who = spec.experts(config), _family(spec.name)
    if shape is not None and not isinstance(shape, ExpertShape):
        raise wrong(who, "experts", shown(shape), "an ExpertShape, or None for a model without experts")
    for glob in plan.expert:
        for name in find_modules(model, glob):
            for leaf, parameter in model.get_submodule(name).named_parameters():
                if shape is None or parameter.shape[:1] != (shape.num_experts,):
                    came = "None" if shape is None else f"{shape.num_experts} experts"
                    has = f"the length of dim 0 of what the plan calls expert, and {name}.{leaf}"
                    raise wrong(who, "experts", came, f"{has} is {list(parameter.shape)}")
    return shape


def check_kv_heads(spec: ModelSpec, entry: ModelEntry, size: str, config: Any) -> None:
    """Compare the K/V heads that an entry lists for a size with those of its layers."""
    listed = entry.kv_heads.get(size)
    own = [shape.num_kv_heads for shape in spec.heads(config)] if listed is not None else None
    if listed is not None and list(listed) != own:
        raise wrong(
            _family(entry.name),
            "zoo_register_models",
            f"kv_heads {list(listed)} for {size}",
            f"those of its heads: {own}",
        )


def checked_rules(spec: ModelSpec, rules: Any, shapes: Mapping[str, Shape]) -> RuleBook:
    """Apply a family's rules to the shapes of its parameters: each of ours and of the hub's is there exactly once."""
    says = "rules that use every tensor of ours and of the hub's once"
    if not isinstance(rules, Sequence) or not all(hasattr(rule, "ours") and hasattr(rule, "pieces") for rule in rules):
        raise wrong(_family(spec.name), "rules", shown(rules), "a tuple of rules, which have ours and pieces")
    try:
        book = RuleBook(rules, shapes)
        _ = book.hub
    except ValueError as error:
        raise wrong(_family(spec.name), "rules", "what does not fit its model", f"{says}; {error}") from error
    for name, shape in shapes.items():
        if not _fills(book.pieces[name], shape):
            boxes = ", ".join(f"{list(piece.shape)} at {list(piece.start)}" for piece in book.pieces[name][:3])
            raise wrong(_family(spec.name), "rules", f"pieces {boxes} for {name} {list(shape)}", says)
    return book


def _fills(pieces: Sequence[Piece], shape: Shape) -> bool:
    """Return whether boxes lie inside a shape, begin apart from each other, and have its size together."""
    inside = all(
        len(piece.start) == len(piece.shape) == len(shape)
        and all(a >= 0 and a + n <= size for a, n, size in zip(piece.start, piece.shape, shape, strict=True))
        for piece in pieces
    )
    apart = len({piece.start for piece in pieces}) == len(pieces)
    return inside and apart and sum(math.prod(piece.shape) for piece in pieces) == math.prod(shape)


# What it returns ----------------------------------------------------------------------------------


def check_losses(family: str, model: nn.Module, losses: Losses, device: torch.device) -> None:
    """Look at what a model returned with labels. Its values stay on the device."""
    who = _family(family) if family else f"model {type(model).__name__}"
    says = "the sum of the token losses, 0-dim with a gradient, or Losses"
    tokens = losses.tokens
    if not isinstance(tokens, Tensor) or tokens.ndim or not tokens.is_floating_point() or not tokens.requires_grad:
        raise wrong(who, "forward with labels", shown(tokens), says)
    if tokens.device.type != device.type:
        raise wrong(who, "forward with labels", shown(tokens), f"{says}, on {device.type} as its batch")
    rows = losses.rows
    if isinstance(rows, Tensor):
        fits = rows.ndim == 0 and rows.is_floating_point() and rows.device == tokens.device
    else:
        fits = isinstance(rows, int | float)
    if not fits:
        raise wrong(who, "forward with labels", f"rows {shown(rows)}", "what counts once a row, 0-dim")
    _check_reports(who, losses)


def _check_reports(who: str, losses: Losses) -> None:
    for kind, report in (("report", losses.report), ("token_report", losses.token_report)):
        if not isinstance(report, Mapping):
            raise wrong(who, "forward with labels", f"{kind} {shown(report)}", "a mapping of metrics by name")
        for name, value in report.items():
            if name in OWN_METRICS or not isinstance(name, str):
                says = f"other names than zoo's own: {', '.join(sorted(OWN_METRICS))}"
                raise wrong(who, "forward with labels", f"a metric {shown(name)} in {kind}", says)
            if not isinstance(value, Tensor) or value.ndim > 1 or value.requires_grad or value.is_complex():
                came = f"{kind} {name!r} as {shown(value)}{' with a gradient' if _has_gradient(value) else ''}"
                raise wrong(who, "forward with labels", came, "0-dim or vectors, without a gradient")
    twice = sorted(losses.report.keys() & losses.token_report.keys())
    if twice:
        raise wrong(who, "forward with labels", f"{twice[0]!r} in report and token_report", "each name in one of them")


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
