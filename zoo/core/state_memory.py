"""What a rank holds whatever a step computes: weights, gradients and optimizer state, as a layout cuts them.

Values are counted by how they may be cut: by `tp` what the plan names, by `ep` experts, both by data parallelism as its
adapter says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zoo.core.contracts import Part, Setup
from zoo.core.mesh import Degrees

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


class Values(NamedTuple):
    """Numbers of parameter values."""

    cut: int = 0
    """In what `tp` cuts."""
    rest: int = 0
    expert: int = 0
    """In what `ep` deals out."""

    def plus(self, other: Values) -> Values:
        return Values(*(a + b for a, b in zip(self, other, strict=True)))

    def dense(self, degrees: Degrees) -> float:
        """Of a rank before data parallelism cuts, experts aside."""
        return self.cut / degrees.tp + self.rest

    def experts(self, degrees: Degrees) -> float:
        return self.expert / degrees.ep

    def here(self, degrees: Degrees) -> float:
        return self.dense(degrees) + self.experts(degrees)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelValues:
    """The parameters of a model; tied ones counted once."""

    blocks: Sequence[Values]
    ends: Values
    """All that is in no block: embedding, last norm, head."""

    @property
    def total(self) -> Values:
        return sum_of([*self.blocks, self.ends])


def sum_of(values: Sequence[Values]) -> Values:
    """Added up, kind by kind."""
    total = Values()
    for each in values:
        total = total.plus(each)
    return total


def state_bytes(model: ModelValues, degrees: Degrees, setup: Setup, whole: Collection[Part]) -> float:
    """The least that the fullest rank holds between a backward and the optimizer's step.

    Master weights, their gradients, and AdamW's two moments, all in the master type; beside them, where they stay
    whole, the weights in the type they are computed with. Stages are taken as equal, so no rank may hold less.
    """
    master, compute = BYTES[setup.master_dtype], BYTES[setup.dtype]
    ranks, total = degrees.dp_shard * degrees.cp, model.total
    held = 0.0
    for values, over in ((total.dense(degrees), ranks), (total.experts(degrees), ranks // degrees.ep)):
        copies = values * compute if "weights" in whole and (over > 1 or compute != master) else 0.0
        optimizer = 3 * master * values / (1 if "optimizer" in whole else over)
        gradients = master * values / (1 if "gradients" in whole else over)
        held += copies + optimizer + gradients
    return held / degrees.pp


def uneven(model: ModelValues, pp: int) -> float:
    """What the fullest stage has beside an equal share, roughly: blocks come whole, and an end comes on top."""
    blocks, ends = sum(sum_of(model.blocks)), sum(model.ends)
    if pp == 1:
        return 1.0
    most = -(-len(model.blocks) // pp) / len(model.blocks) * blocks + ends
    return most * pp / (blocks + ends)


def gathered_bytes(model: ModelValues, degrees: Degrees, setup: Setup) -> float:
    """The most that is whole for a moment where weights are cut: two blocks and the ends, and a gradient of the larger.

    One block is computed while the next arrives; the ends are one unit that stays.
    """
    compute = BYTES[setup.dtype]
    block = max((values.here(degrees) for values in model.blocks), default=0.0)
    ends = model.ends.here(degrees)
    return compute * (2 * block + ends) + (compute + BYTES[setup.master_dtype]) * max(block, ends)
