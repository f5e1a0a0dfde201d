"""From the degrees that were given to all of them, checked as arithmetic."""

from __future__ import annotations

import math

from zoo.core.errors import LayoutError
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import AXES, EVERY_AXIS, Degrees, flag
from zoo.core.plan.nearest import nearest_numbers


def check_degrees(layout: LayoutSection) -> None:
    """Raises LayoutError if one is less than 1."""
    for axis in EVERY_AXIS:
        degree = getattr(layout, axis)
        if degree is not None and degree < 1:
            raise LayoutError(f"{flag(axis)} {degree}: a degree is at least 1")


def resolve_degrees(
    layout: LayoutSection, *, world_size: int | None, available: int | None, said: str = "this launcher started"
) -> Degrees:
    """Fill unset degrees. `world_size` is fixed by whom `said` names, `available` counts accelerators, if any.

    Where neither says how many ranks there are, an unset dp_shard is the least that --ep needs.

    Raises LayoutError if the product cannot be the number of ranks.
    """
    check_degrees(layout)
    others = {axis: getattr(layout, axis) or 1 for axis in AXES if axis != "dp_shard"}
    fixed, ep, cp = math.prod(others.values()), layout.ep or 1, others["cp"]
    target = world_size or available or fixed * (layout.dp_shard or ep // math.gcd(ep, cp))
    dp_shard = layout.dp_shard or max(1, target // fixed)
    ranks = fixed * dp_shard
    asked = " x ".join(
        f"{flag(axis)} {value}" for axis in AXES if (value := getattr(layout, axis)) is not None and value > 1
    )
    if world_size is not None and ranks != world_size:
        needed = f"{ranks} ranks" if layout.dp_shard else f"a multiple of {fixed} ranks"
        raise LayoutError(
            f"{asked or 'one process'} needs {needed} and {said} {world_size}",
            f"start {fixed * max(1, world_size // fixed)}, or choose degrees whose product divides {world_size}",
        )
    # An outer launcher's ranks may be on several machines, and it saw to the accelerators.
    if world_size is None and available is not None and ranks > available:
        raise LayoutError(
            f"{asked} needs {ranks} ranks and this machine has {available} accelerators",
            "lower a degree, or start more machines with torchrun",
        )
    _check_fold(ep, dp_shard, cp)
    return Degrees(dp_shard=dp_shard, ep=ep, **others)


def _check_fold(ep: int, dp_shard: int, cp: int) -> None:
    ranks = dp_shard * cp
    if ranks % ep == 0:
        return
    choices = " or ".join(f"--ep {degree}" for degree in nearest_numbers(ep, ranks, lambda d: ranks % d == 0))
    raise LayoutError(
        f"--ep {ep} must divide --dp-shard {dp_shard} x --cp {cp} = {ranks} ranks, over which experts are dealt out",
        f"nearest: {choices}, or choose --dp-shard and --cp whose product is a multiple of {ep}",
    )
