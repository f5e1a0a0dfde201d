"""The ring's plan: which rows travel over each hop, and what a rank computes at each step. Host only.

P ranks stand in a ring; K/V of every rank move one rank further at each hop, in one direction. At step i a rank
holds what is left of the K/V of the rank i places back: after each hop only the rows that this rank or one further
on still needs are there. Gradients of K/V follow the same way one step behind, and grow by each rank's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from zoo import HeadShape, Mask, Need, SequenceLayout, Stage, local_slices, remote_needs, remote_slices
from zoo.core.attention.slices import Slices, Step
from zoo.core.attention.wire import Message, rows_in
from zoo.core.sequence.ranges import Range, Ranges, RowIndex, count, union

GRADIENT_WEIGHT = 2
"""What a gradient row costs relative to a K/V row when the backward direction is chosen: fp32 beside bf16."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Messages of one rank between two steps; rows are rows of the buffers sent from and received into."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class RingPass:
    """One way round the ring, as one rank sees it. Index i of every tuple belongs to step or hop i + 1."""

    direction: int
    """+1: K/V move to the next rank; -1: to the previous."""
    packed: Ranges
    """Local rows that leave this rank."""
    steps: tuple[Step, ...]
    rows: tuple[int, ...]
    """K/V rows of the buffer at each step."""
    hops: tuple[Hop, ...]
    """Hop i brings the K/V of step i."""
    gradient_rows: tuple[int, ...]
    """Rows of the dK/dV buffer at each step."""
    seen: tuple[tuple[tuple[Range, Range], ...], ...]
    """At each step the rows this rank sees: relative to the step's keys, and in the dK/dV buffer."""
    gradient_hops: tuple[Hop, ...]
    """Hop i takes the dK/dV of step i on; the last one brings this rank's own home."""
    home: Ranges
    """Local rows whose gradients come home."""

    @property
    def sent_rows(self) -> int:
        """K/V rows this rank sends in the pass."""
        return sum(rows_in(hop.sends) for hop in self.hops)

    @property
    def sent_gradient_rows(self) -> int:
        """dK/dV rows this rank sends in the pass."""
        return sum(rows_in(hop.sends) for hop in self.gradient_hops)


@dataclass(frozen=True, slots=True)
class RingPlan:
    """What one rank does for one batch, in every layer of one shape."""

    heads: HeadShape
    own: Slices
    """Step 0: this rank's queries and keys."""
    forward: RingPass
    backward: RingPass

    @property
    def slices(self) -> Slices:
        """Every slice of the forward pass, relative to its step."""
        return self.own + tuple(s for step in self.forward.steps for s in step.slices)

    def stages(self, value_bytes: int, gradient_bytes: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """While a rank computes with the keys of step i, those of step i + 1 and the gradients of i - 1 travel."""
        row = 2 * self.heads.num_kv_heads * self.heads.head_dim
        scores = [self.heads.num_heads * sum(s.area for s in self.own)]
        stages = []
        for way, gradients in ((self.forward, 0), (self.backward, gradient_bytes)):
            areas = scores + [self.heads.num_heads * step.area for step in way.steps]
            keys = [value_bytes * row * rows_in(hop.sends) for hop in way.hops]
            sums = [gradients * row * rows_in(hop.sends) for hop in way.gradient_hops]
            columns = zip_longest(areas, keys, [0, 0, *sums] if gradients else [], fillvalue=0)
            stages.append(tuple(Stage(key + total, area) for area, key, total in columns))
        return stages[0], stages[1]


class Route:
    """Rows of every rank at every hop of one direction."""

    def __init__(self, needs: Sequence[Need], degree: int, direction: int) -> None:
        self.degree, self.direction = degree, direction
        self._needs: list[list[Need]] = [[] for _ in range(degree)]
        self._spans: list[list[tuple[int, int, Range]]] = [[] for _ in range(degree)]
        for need in needs:
            hops = [(rank - need.owner) * direction % degree for rank in need.ranks]
            self._needs[need.owner].append(need)
            self._spans[need.owner].append((min(hops), max(hops), need.rows))

    def owner(self, rank: int, hop: int) -> int:
        """Whose rows a rank holds after a hop."""
        return (rank - self.direction * hop) % self.degree

    def wanted(self, owner: int, hop: int) -> Ranges:
        """Rows of `owner` that travel over a hop: those that a rank from there on needs."""
        return union(rows for _, last, rows in self._spans[owner] if last >= hop)

    def touched(self, owner: int, hop: int) -> Ranges:
        """Rows of `owner` that have a gradient after a step: those that a rank up to there saw."""
        return union(rows for first, _, rows in self._spans[owner] if first <= hop)

    def seen(self, owner: int, rank: int) -> Ranges:
        """Rows of `owner` that a rank's queries see."""
        return union(need.rows for need in self._needs[owner] if rank in need.ranks)

    def volume(self, *, gradient_weight: int) -> int:
        """Rows sent over all ranks and hops, gradient rows counted with a weight."""
        total = 0
        for owner, spans in enumerate(self._spans):
            edges = sorted({1, self.degree, *(first for first, _, _ in spans), *(last + 1 for _, last, _ in spans)})
            for start, stop in pairwise(edges):
                rows = count(self.wanted(owner, start)) + gradient_weight * count(self.touched(owner, start))
                total += (stop - start) * rows
        return total


def ring_plan(
    mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape, *, peers: Sequence[int] | None = None
) -> RingPlan:
    """The plan of one rank. Every rank computes the same directions, so their messages match.

    `peers` are the ranks of the process group that stand in the ring, if they are not all of it.
    """
    peers = range(layout.degree) if peers is None else peers
    needs = remote_needs(mask, layout)
    routes = [Route(needs, layout.degree, direction) for direction in (1, -1)]
    forward = min(routes, key=lambda route: route.volume(gradient_weight=0))
    backward = min(routes, key=lambda route: route.volume(gradient_weight=GRADIENT_WEIGHT))
    return RingPlan(
        heads=heads,
        own=local_slices(mask, layout.chunks[rank]),
        forward=_ring_pass(mask, layout, rank, forward, peers),
        backward=_ring_pass(mask, layout, rank, backward, peers),
    )


def _ring_pass(mask: Mask, layout: SequenceLayout, rank: int, route: Route, peers: Sequence[int]) -> RingPass:
    ranks = range(1, layout.degree)
    chunks = layout.chunks[rank]
    held = [route.wanted(route.owner(rank, hop), hop) for hop in ranks]
    touched = [route.touched(route.owner(rank, hop), hop) for hop in ranks]
    seen = [route.seen(route.owner(rank, hop), rank) for hop in ranks]
    steps = tuple(Step.around(remote_slices(mask, chunks, keys)) for keys in held)
    index = RowIndex(chunks)
    onward, behind = (peers[(rank + way) % layout.degree] for way in (route.direction, -route.direction))
    return RingPass(
        direction=route.direction,
        packed=index.locate(route.wanted(rank, 1)),
        steps=steps,
        rows=tuple(map(count, held)),
        hops=tuple(_key_hop(route, rank, hop, onward, behind) for hop in ranks),
        gradient_rows=tuple(map(count, touched)),
        seen=tuple(map(_seen_rows, steps, seen, held, touched)),
        gradient_hops=tuple(_gradient_hop(route, rank, hop, onward, behind) for hop in ranks),
        home=index.locate(route.touched(rank, layout.degree - 1)),
    )


def _seen_rows(step: Step, seen: Ranges, held: Ranges, touched: Ranges) -> tuple[tuple[Range, Range], ...]:
    keys, gradients = RowIndex(held), RowIndex(touched)
    pairs = []
    for start, stop in seen:
        source, target, rows = keys.before(start) - step.keys[0], gradients.before(start), stop - start
        pairs.append(((source, source + rows), (target, target + rows)))
    return tuple(pairs)


def _key_hop(route: Route, rank: int, hop: int, onward: int, behind: int) -> Hop:
    """What is still wanted leaves the buffer of step `hop - 1` in runs and arrives without gaps."""
    sends = _key_runs(route, route.owner(rank, hop - 1), hop)
    arriving = _key_runs(route, route.owner(rank, hop), hop)
    return Hop(
        tuple(Message(onward, run) for run in sends),
        tuple(Message(behind, run) for run in _closed(arriving)),
    )


def _key_runs(route: Route, owner: int, hop: int) -> Ranges:
    """Runs of the buffer that holds an owner's rows before a hop. The first buffer holds just what leaves."""
    return RowIndex(route.wanted(owner, max(hop - 1, 1))).locate(route.wanted(owner, hop))


def _gradient_hop(route: Route, rank: int, hop: int, onward: int, behind: int) -> Hop:
    """What has a gradient leaves without gaps and arrives in runs of the next rank's larger buffer."""
    sends = _gradient_runs(route, route.owner(rank, hop), hop)
    arriving = _gradient_runs(route, route.owner(rank, hop + 1), hop)
    return Hop(
        tuple(Message(onward, run) for run in _closed(sends)),
        tuple(Message(behind, run) for run in arriving),
    )


def _gradient_runs(route: Route, owner: int, hop: int) -> Ranges:
    """Runs of the buffer that will hold an owner's gradients after a hop. At home they lie without gaps."""
    after = min(hop + 1, route.degree - 1)
    return RowIndex(route.touched(owner, after)).locate(route.touched(owner, hop))


def _closed(runs: Ranges) -> Ranges:
    """Runs of the same sizes, moved together without gaps."""
    index = RowIndex(runs)
    return tuple((index.before(start), index.before(start) + stop - start) for start, stop in runs)
