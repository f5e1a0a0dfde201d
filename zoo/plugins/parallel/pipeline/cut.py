"""Where a pipeline cuts a model: the blocks of each stage, its ends, and what is tied across them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from zoo import Layout, ParallelPlan, find_modules
from zoo.core.model.inventory import matrix_values
from zoo.plugins.parallel.pipeline.stages import balance, stages_of, virtual


class Places(Protocol):
    """What a mesh knows of this rank."""

    def rank(self, axis: str) -> int:
        """Its place on an axis."""

    def size(self, axis: str) -> int:
        """The degree of an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Where a model is cut, as names of modules."""

    blocks: list[list[str]]
    """Of each stage."""
    mine: list[int]
    """Stages of this rank."""
    first: list[str]
    last: list[str]
    """What only the first and the last stage need."""
    loss: list[str]
    layer_sum: list[str]
    row_sum: list[str]
    """Names of these seams."""
    tied: frozenset[str]
    """Parameters that both of them have."""
    classes: Mapping[str, type[nn.Module]]
    """Of the modules that hold blocks or ends."""
    hidden_size: int
    num_experts: int

    @classmethod
    def of(cls, model: nn.Module, plan: ParallelPlan, mesh: Places, layout: Layout) -> Partition:
        """For a whole model on meta."""
        names, pp = find_modules(model, plan.block), mesh.size("pp")
        first, last = ([n for glob in globs for n in find_modules(model, glob)] for globs in (plan.first, plan.last))
        costs = _costs(model, names, plan, layout.model.scores(layout.seq))
        # A look-up multiplies nothing.
        head = sum(matrix_values(model.get_submodule(name)) for name in last)
        parts = balance(costs, pp * virtual(layout.settings), last=float(head))
        ends = [{id(p) for name in end for p in model.get_submodule(name).parameters()} for end in (first, last)]
        holders = {name[:i] for name in (*names, *first, *last) for i, c in enumerate(name) if c == "."}
        return cls(
            blocks=[[names[i] for i in part] for part in parts],
            mine=stages_of(mesh.rank("pp"), pp, layout.settings),
            first=first,
            last=last,
            loss=find_modules(model, plan.seams["loss"]),
            layer_sum=find_modules(model, plan.seams["layer_sum"]) if "layer_sum" in plan.seams else [],
            row_sum=find_modules(model, plan.seams["row_sum"]) if "row_sum" in plan.seams else [],
            tied=frozenset(name for name, p in model.named_parameters() if id(p) in ends[0] & ends[1]),
            classes={name: type(model.get_submodule(name)) for name in ("", *holders)},
            hidden_size=next(p.shape[-1] for p in _parameters(model, plan.first)),
            num_experts=next((p.shape[0] for p in _parameters(model, plan.expert)), 0),
        )

    @property
    def num_stages(self) -> int:
        return len(self.blocks)

    @property
    def holds_end(self) -> bool:
        """Whether the first or the last stage is here."""
        return not {0, self.num_stages - 1}.isdisjoint(self.mine)


def _parameters(model: nn.Module, globs: Sequence[str]) -> Iterator[nn.Parameter]:
    return (p for glob in globs for name in find_modules(model, glob) for p in model.get_submodule(name).parameters())


def _costs(model: nn.Module, blocks: Sequence[str], plan: ParallelPlan, scores: Sequence[float]) -> list[float]:
    """Of each block, multiplications of a token: values of matrices, and scores where it has attention."""
    attending = [name for name in find_modules(model, plan.seams["attention"])]
    of_layer = dict(zip(attending, scores, strict=True)) if scores else {}
    return [
        matrix_values(model.get_submodule(block))
        + sum(cost for name, cost in of_layer.items() if name.startswith(f"{block}."))
        for block in blocks
    ]
