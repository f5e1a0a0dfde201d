"""How many stages a pipeline has, which blocks each gets and on which rank it lies; what each schedule asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from zoo import Layout, LayoutSection, SeamName
from zoo.core.errors import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a schedule asks for, by the rules of torch.distributed.pipelining."""

    least_virtual: int
    """Stages a rank, and the number taken where none is said."""
    most_virtual: int | None
    in_rounds: bool = False
    """Microbatches come in rounds, about one a rank, all of the same size."""
    fills: bool = False
    """At least one microbatch for each stage."""
    splits: bool = False
    """Gradients of inputs first, those of weights later."""
    folds: bool = False
    """The first half of the stages goes down the ranks and the other half back up."""


SCHEDULES = {
    "1f1b": Schedule(least_virtual=1, most_virtual=1, fills=True),
    "gpipe": Schedule(least_virtual=1, most_virtual=1),
    "interleaved": Schedule(least_virtual=2, most_virtual=None, in_rounds=True),
    "zero-bubble": Schedule(least_virtual=1, most_virtual=None, in_rounds=True, splits=True),
    "zbv": Schedule(least_virtual=2, most_virtual=2, splits=True, folds=True),
}


def virtual(settings: LayoutSection) -> int:
    """Return the number of stages of a rank."""
    return settings.pp_virtual or SCHEDULES[settings.pp_schedule].least_virtual


def stages_of(rank: int, ranks: int, settings: LayoutSection) -> list[int]:
    """Return the stages that a rank of `pp` runs, ascending."""
    if SCHEDULES[settings.pp_schedule].folds:
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, ranks * virtual(settings), ranks))


_Way = tuple[float, float, tuple[int, ...]]


def balance(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Blocks in a row for each stage, at least one, so that the dearest stage costs least, then the most even way.

    `first` and `last` are what the first and the last stage have to do beside their blocks.
    """
    sums = [0.0, *accumulate(costs)]
    extra = {0: first, num_stages - 1: last} if num_stages > 1 else {0: first + last}

    def cost(stage: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + extra.get(stage, 0.0)

    # best[stop]: (dearest stage, sum of squares, cuts) of the stages so far over the first `stop` blocks.
    best: dict[int, _Way] = {0: (0.0, 0.0, (0,))}
    for stage in range(num_stages):
        ways: dict[int, _Way] = {}
        for start, (dearest, squares, cuts) in best.items():
            for stop in range(start + 1, len(costs) + 1):
                c = cost(stage, start, stop)
                way = (max(dearest, c), squares + c * c, (*cuts, stop))
                ways[stop] = min(ways.get(stop, way), way)
        best = ways
    cuts = best[len(costs)][2]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def objection(layout: Layout) -> str | None:
    """None, or why this pipeline cannot be."""
    schedule = layout.settings.pp_schedule
    if schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        return f"--pp-schedule {schedule}: it is one of {', '.join(SCHEDULES)}{f' ({hint})' if hint else ''}"
    rules = (_virtual_objection, _blocks_objection, _seams_objection, _rounds_objection, _shape_objection)
    reasons = (rule(layout) for rule in rules)
    return next((reason for reason in reasons if reason), None)


def _virtual_objection(layout: Layout) -> str | None:
    schedule = layout.settings.pp_schedule
    rules, wanted = SCHEDULES[schedule], virtual(layout.settings)
    most = rules.most_virtual
    if wanted >= rules.least_virtual and (most is None or wanted <= most):
        return None
    nearest = rules.least_virtual if wanted < rules.least_virtual or most is None else most
    other = "; several stages a rank need --pp-schedule interleaved" if most == 1 else ""
    return (
        f"--pp-virtual {wanted}: schedule {schedule} runs {'at least' if most is None else 'exactly'} {nearest} "
        f"stages a rank{other}"
    )


def _blocks_objection(layout: Layout) -> str | None:
    pp, per_rank, blocks = layout.degrees.pp, virtual(layout.settings), layout.model.config.num_hidden_layers
    if pp * per_rank <= blocks:
        return None
    return (
        f"--pp {pp} x {per_rank} stages a rank = {pp * per_rank} stages and {layout.model.name} has {blocks} blocks, "
        f"of which each stage needs one"
    )


def _seams_objection(layout: Layout) -> str | None:
    """What enters a model by a seam, on every rank, needs one there."""
    model, pp = layout.model, layout.degrees.pp
    if not model.blocks:
        return None
    parts = balance(block_costs(layout), pp * virtual(layout.settings), last=float(model.last_values))
    everywhere = frozenset[SeamName]().union(*(block.seams for block in model.blocks))
    for rank in range(pp):
        mine = [model.blocks[i] for stage in stages_of(rank, pp, layout.settings) for i in parts[stage]]
        missing = everywhere.difference(*(block.seams for block in mine))
        if missing:
            return (
                f"--pp {pp} leaves rank {rank} of the pipeline without any '{min(missing)}' in its blocks: "
                f"those of {model.name} differ"
            )
    return None


def block_costs(layout: Layout) -> list[float]:
    """Return the multiplications of a token in each block: values of matrices, and scores where it has attention."""
    scores = iter(layout.model.scores(layout.seq))
    return [b.matrix_values + (next(scores, 0.0) if "attention" in b.seams else 0.0) for b in layout.model.blocks]


def _rounds_objection(layout: Layout) -> str | None:
    schedule, pp = layout.settings.pp_schedule, layout.degrees.pp
    if takes(schedule, pp, layout.microbatches):
        return None
    want = f"at least {pp}" if SCHEDULES[schedule].fills else f"rounds of equal size, about {pp} in each"
    return (
        f"schedule {schedule} over --pp {pp} needs {want} microbatches a step and --global-batch "
        f"{layout.global_batch} makes {layout.microbatches}"
    )


def _shape_objection(layout: Layout) -> str | None:
    """Where a row is cut unevenly, documents decide which rank gets the token more."""
    seq, cp = layout.seq, layout.degrees.cp
    if seq % cp == 0:
        return None
    return f"a pipeline's microbatches have one shape and --seq {seq} is no multiple of --cp {cp}"


def takes(schedule: str, pp: int, microbatches: int) -> bool:
    """Whether a schedule can order so many microbatches."""
    rules = SCHEDULES[schedule]
    if rules.fills:
        return microbatches >= pp
    return not rules.in_rounds or microbatches % max(1, microbatches // pp) == 0
