"""How far each mesh axis can cut a model, by its config.json's fields alone. Imports without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from zoo.core.mesh.degrees import divisors

_EXPERTS = ("num_local_experts", "num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLimits:
    """The degrees that an axis may have; None where the fields do not say. `cp` takes any degree up to the tokens."""

    tp: tuple[int, ...] | None
    """Those that deal out the query heads and the K/V heads of every layer evenly."""
    ep: tuple[int, ...] | None
    """Those that deal out the experts evenly; None for a model without experts."""
    pp: int | None
    """At most this many, for a stage holds a layer at least."""


def kv_heads(fields: Mapping[str, Any], by_layer: Sequence[int] = ()) -> tuple[int, ...]:
    """The numbers of K/V heads that layers have; empty where the fields do not say."""
    if by_layer:
        return tuple(sorted(set(by_layer)))
    found = fields.get("num_key_value_heads")
    found = fields.get("num_attention_heads") if found is None else found
    return (found,) if _is_count(found) else ()


def axis_limits(fields: Mapping[str, Any], by_layer: Sequence[int] = ()) -> AxisLimits:
    """From a size's fields, and its K/V heads layer by layer where they differ."""
    layers, heads = fields.get("num_hidden_layers"), fields.get("num_attention_heads")
    experts = next((fields[name] for name in _EXPERTS if _is_count(fields.get(name))), None)
    shared = kv_heads(fields, by_layer)
    return AxisLimits(
        tp=divisors(math.gcd(*shared, heads)) if shared and _is_count(heads) else None,
        ep=divisors(experts) if experts else None,
        pp=layers if _is_count(layers) else None,
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
