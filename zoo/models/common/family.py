"""What the plugin module of a built-in family says, made of its entry; imports nothing until a hook needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo import ModelEntry, hookimpl
from zoo.core.contracts.entries import load_target

if TYPE_CHECKING:
    from zoo import Layout

TINY_RECIPE = {"data.path": "stdlib", "optim.lr": 1e-3, "schedule.steps": 6}
"""The corpus that tiny models are trained on, at a rate and length that show something within minutes."""


class Family:
    """The four hooks of a model family; its plugin module binds them to their names."""

    def __init__(self, entry: ModelEntry, *, for_length: str, objections: Sequence[str] = ()) -> None:
        """`for_length` names (fields of config.json, tokens) -> fields to change; `objections` names functions of a
        Layout that give a sentence or None, dynamic RoPE's being among them already.
        """
        self.entry = entry
        self.model_types = (entry.model_type, *entry.other_types)
        self._for_length = for_length
        self._objections = ("zoo.models.common.rope_parameters:dynamic_objection", *objections)

    @hookimpl
    def zoo_register_models(self) -> Sequence[ModelEntry]:
        return [self.entry]

    @hookimpl(trylast=True)
    def zoo_match_checkpoint(self, config: Mapping[str, Any]) -> str | None:
        return self.entry.name if config.get("model_type") in self.model_types else None

    @hookimpl(trylast=True)
    def zoo_rope_for_length(self, model: str, config: Mapping[str, Any], seq: int) -> Mapping[str, Any] | None:
        if model != self.entry.name:
            return None
        fields: Mapping[str, Any] = load_target(self._for_length)(config, seq)
        return fields

    @hookimpl
    def zoo_check_layout(self, layout: Layout) -> str | None:
        if layout.model.name != self.entry.name:
            return None
        sentences = (load_target(target)(layout) for target in self._objections)
        return next((sentence for sentence in sentences if sentence), None)
