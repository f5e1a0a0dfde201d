"""RoPE as config.json states it, in the forms of transformers 4 and 5, read and written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo import DataError
from zoo.models.common.fields import Fields

if TYPE_CHECKING:
    from zoo import Layout

_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
_SAID_ABOVE = ("rope_theta", "partial_rotary_factor")
"""Written both inside `rope_parameters` and beside it."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_WITH_ORIGINAL = ("llama3", "yarn")
_MAX_LENGTH = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """One RoPE variant. Fields carry the hub's names; None means absent."""

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None
    """Share of each head that is rotated, its first numbers; None for families that always rotate all."""

    def rotated(self, head_dim: int) -> int:
        """How many of a head's numbers are rotated."""
        return head_dim if self.partial_rotary_factor is None else int(head_dim * self.partial_rotary_factor)

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, `rope_theta` included: transformers 5's `rope_parameters`."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in found.items() if value is not None}


def parse_rope(
    config: Mapping[str, Any],
    *,
    default_theta: float,
    max_position_embeddings: int,
    default_partial: float | None = None,
) -> RopeParameters:
    """From config.json's fields, with transformers 5's precedence. Raises DataError.

    A non-empty `rope_scaling` wins over `rope_parameters`; theta and `partial_rotary_factor` are the object's own,
    else the top-level ones, else the family's default (None: this family always rotates whole heads). A top-level
    `original_max_position_embeddings` wins over the object's, as it does when transformers 5.23 builds a model;
    without either it is `max_position_embeddings`.
    """
    top = Fields(config)
    name = "rope_scaling" if top.mapping("rope_scaling") else "rope_parameters"
    rope = Fields(top.mapping(name), where=f"config.json: {name}")
    theta = rope.number("rope_theta", top.number("rope_theta", default_theta, low=1.0), low=1.0)
    kind = _kind(rope)
    partial = _partial(top, rope, default_partial)
    if kind == "default":
        return RopeParameters(rope_theta=theta, partial_rotary_factor=partial)
    original = None
    if kind in _WITH_ORIGINAL:
        source = top if top.has("original_max_position_embeddings") else rope
        original = source.integer("original_max_position_embeddings", max_position_embeddings, high=_MAX_LENGTH)
    scaled = _scaled(rope, kind, theta=theta, original=original, length=max_position_embeddings)
    return replace(scaled, partial_rotary_factor=partial)


def _partial(top: Fields, rope: Fields, default: float | None) -> float | None:
    if default is None:
        for fields in (top, rope):
            fields.fixed("partial_rotary_factor", 1.0)
        return None
    return rope.number("partial_rotary_factor", top.number("partial_rotary_factor", default, high=1.0), high=1.0)


def _kind(rope: Fields) -> str:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise DataError(f"{rope.where}.rope_type is {kind!r:.80}: it must be one of {', '.join(ROPE_TYPES)}")
    return str(kind)


def _scaled(rope: Fields, kind: str, *, theta: float, original: int | None, length: int) -> RopeParameters:
    if kind == "yarn" and not rope.has("factor") and original is not None:
        factor = length / original
    else:
        factor = _required(rope, "factor")
    if factor <= 0:
        raise rope.wrong("factor", "it must be above 0")
    if kind == "llama3":
        return _llama3(rope, theta, factor, original)
    if kind == "yarn":
        return _yarn(rope, theta, factor, original)
    return RopeParameters(rope_type=kind, rope_theta=theta, factor=factor)


def _llama3(rope: Fields, theta: float, factor: float, original: int | None) -> RopeParameters:
    low, high = _required(rope, "low_freq_factor"), _required(rope, "high_freq_factor")
    if not 0 < low < high:
        raise rope.wrong("high_freq_factor", f"it must be above low_freq_factor ({low:g}), which must be above 0")
    return RopeParameters(
        rope_type="llama3",
        rope_theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _yarn(rope: Fields, theta: float, factor: float, original: int | None) -> RopeParameters:
    if theta <= 1.0:
        raise rope.wrong("rope_theta", "yarn needs it above 1")
    return RopeParameters(
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_optional(rope, "attention_factor"),
        beta_fast=_optional(rope, "beta_fast"),
        beta_slow=_optional(rope, "beta_slow"),
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        truncate=rope.boolean("truncate", True) if rope.has("truncate") else None,
    )


def _required(rope: Fields, name: str) -> float:
    if not rope.has(name):
        raise DataError(f"{rope.where}.{name} is missing: this rope_type needs it")
    return rope.number(name, 0.0)


def _optional(rope: Fields, name: str) -> float | None:
    return rope.number(name, 0.0) if rope.has(name) else None


def hub_rope(rope: RopeParameters, *, max_position_embeddings: int) -> dict[str, Any]:
    """The fields that make transformers 4 and 5 build the same model.

    transformers 4 reads `rope_theta` and `rope_scaling` only, and 5 drops theta if `rope_scaling` comes
    without a top-level `rope_theta`, so all three are always written. Some releases of 4 (4.53) derive yarn's
    factor from `original_max_position_embeddings` where that is given, so it is left out where it says nothing.
    A partial factor stands at the top for 4 and in `rope_parameters` for 5. transformers 4 knows no scaling in the
    families that have one: a variant beyond `default` is read by 5 alone.
    """
    parameters = rope.as_dict()
    scaling = {name: value for name, value in parameters.items() if name not in _SAID_ABOVE}
    partial = rope.partial_rotary_factor
    if rope.rope_type == "yarn" and rope.original_max_position_embeddings == max_position_embeddings:
        scaling.pop("original_max_position_embeddings")
    return {
        **({} if partial is None else {"partial_rotary_factor": partial}),
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
        "rope_parameters": parameters,
    }


def override_rope(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_rope`'s fields with those in `over` set anew: one fact in three places, so the word given last wins in all.

    A new `rope_parameters` or `rope_scaling` replaces the variant and keeps theta and the partial factor unless it
    brings its own; a new `rope_theta` or `partial_rotary_factor` alone keeps the variant.
    """
    given = {name: over[name] for name in (*_ROPE_FIELDS, "partial_rotary_factor") if name in over}
    kept = {name: value for name, value in fields.items() if name not in _ROPE_FIELDS}
    if "rope_parameters" in given or "rope_scaling" in given:
        return kept | {"rope_theta": fields["rope_theta"]} | given
    # Not `rope_scaling` as it stands: it may leave out the original length, which must not follow a new one.
    variant = {name: value for name, value in fields["rope_parameters"].items() if name not in _SAID_ABOVE}
    return kept | {"rope_theta": fields["rope_theta"], "rope_scaling": variant} | given


def rope_for_length(rope: RopeParameters, *, native: int, length: int) -> dict[str, Any]:
    """Fields to change so that a model made for `native` positions can be trained on `length`.

    Variants with a factor that stretches positions get a larger one. Otherwise the base grows with the square of
    the ratio: what worked for bases tried on a small Llama from 512 to 64k tokens, and close to what published
    long-context Llamas use.
    """
    ratio = length / native
    fields: dict[str, Any] = {"max_position_embeddings": length}
    if rope.rope_type in ("linear", "yarn") and rope.factor is not None:
        return fields | {"rope_scaling": {**rope.as_dict(), "factor": rope.factor * ratio}}
    return fields | {"rope_theta": rope.rope_theta * ratio**2}


def dynamic_objection(layout: Layout) -> str | None:
    """Dynamic RoPE depends on the longest document a rank sees, so ranks would rotate by different angles."""
    config: Any = layout.model.config
    if config.rope_parameters.rope_type != "dynamic":
        return None
    if layout.seq <= config.max_position_embeddings or not any(layout.degrees.in_use()):
        return None
    return (
        f"RoPE type 'dynamic' changes with the longest document a rank sees, so ranks disagree above "
        f"max_position_embeddings ({config.max_position_embeddings}) and --seq is {layout.seq}: run on one rank, "
        f"stay within it, or set model.rope_scaling to yarn or linear"
    )
