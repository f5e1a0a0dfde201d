"""What a rank holds whatever a step computes: weights, gradients and optimizer state, as a layout cuts them.

Values are counted by how they may be cut: by `tp` what the plan names, by `ep` experts, both by data parallelism as its
adapter says.
"""

from __future__ import annotations

from collections.abc import Collection

from zoo.core.contracts.account import dtype_bytes
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.parallel import StatePart
from zoo.core.contracts.values import ModelValues, sum_of


def state_bytes(layout: Layout, whole: Collection[StatePart]) -> float:
    """The least that the fullest rank holds between a backward and the optimizer's step.

    Master weights, their gradients, and AdamW's two moments, all in the master type; beside them, where they stay
    whole, the weights in the type they are computed with. Stages are taken as equal, so no rank may hold less.
    """
    master, compute = dtype_bytes(layout.master_dtype), dtype_bytes(layout.dtype)
    degrees, total = layout.degrees, layout.model.values.total
    ranks = degrees.dp_shard * degrees.cp
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


def gathered_bytes(layout: Layout) -> float:
    """The most that is whole for a moment where weights are cut: two blocks and the ends, and a gradient of the larger.

    One block is computed while the next arrives; the ends are one unit that stays.
    """
    model, degrees, compute = layout.model.values, layout.degrees, dtype_bytes(layout.dtype)
    block = max((values.here(degrees) for values in model.blocks), default=0.0)
    ends = model.ends.here(degrees)
    return compute * (2 * block + ends) + (compute + dtype_bytes(layout.master_dtype)) * max(block, ends)
