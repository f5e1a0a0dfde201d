"""`--layout auto`: degrees for a model, a row and a machine, by memory arithmetic; wherever asked, the same answer.

A row is cut over `cp` until what grows with it fits; `tp` fills a machine where gathered weights or one row do not fit
without; `pp` goes across machines where that is not enough; experts are dealt out over `ep`; the rest is `dp_shard`.
What was given stays, and every layout passes the one check before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from zoo.core.contracts.account import dtype_bytes
from zoo.core.contracts.parallel import MemoryPolicy
from zoo.core.errors import FitError, LayoutError
from zoo.core.humanize import format_bytes, format_count
from zoo.core.job.job import Job, LayoutSection
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import AXES, Degrees, divisors, flag
from zoo.core.plan.choices import describe_layout
from zoo.core.plan.chosen import Chosen
from zoo.core.plan.memory import gathered_bytes, state_bytes, uneven
from zoo.core.plan.nearest import nearest
from zoo.core.plan.resolve import Notes, Resolution, Resolver, parts_whole
from zoo.core.plan.resolve_degrees import check_degrees, resolve_degrees
from zoo.core.registry.answers import saved_bytes

_SHARE = 0.9
"""Of the memory: the rest is the driver's, the collectives' buffers and what the allocator cannot use."""
_LEAST_TOKENS = 4096
"""A rank with fewer computes too little to hide what it sends to its peers of `cp`."""
_MOST_DEVICES = 1 << 16
_PEERS = 8
"""Devices taken to share a machine when asking how many it would take."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a rank, estimated."""

    state: float
    """Weights, gradients, optimizer state."""
    gathered: float
    """Weights and a gradient that are whole for a moment."""
    rows: float
    """Activations and logits of a microbatch."""

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.rows

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.state)} state + {format_bytes(self.gathered)} gathered + {format_bytes(self.rows)} "
            f"activations = {format_bytes(self.total)}"
        )


def choose_layout(job: Job, resolver: Resolver) -> Chosen[Resolution]:
    """Return the layout of a job that nobody refuses. Raises UsageError, LayoutError, FitError or PluginError."""
    job, notes = with_degrees(job, resolver) if job.layout.degrees == "auto" else (job, ())
    found = replace(resolver.resolve(job), notes=notes)
    return Chosen(found, describe_layout(found.adapters, found.layout.degrees))


def with_degrees(job: Job, resolver: Resolver) -> tuple[Job, Notes]:
    """The job with every degree chosen, and a line on each axis.

    Raises FitError with the number of devices it would take, LayoutError if what was given cannot be completed.
    """
    search = _Search(job, resolver)
    found = search.first()
    if found is not None:
        chosen, degrees = found
        return chosen, search.reasons(degrees)
    if search.refused is not None:
        raise search.refusal()
    least = _least_devices(job, resolver)
    ranks, memory = search.ranks, resolver.machine.rank_memory(search.ranks)
    assert memory is not None, "without memory everything fits"
    tightest = search.tightest
    count = format_count(sum(resolver.model.values.total))
    what = f"{resolver.model.name} with {count} parameters on rows of {job.data.seq:,} tokens"
    none = "and more ranks share its memory" if resolver.machine.shared else f"nor {_MOST_DEVICES:,} of them"
    enough = f"it takes {least}" if least else none
    need = f" (at best {tightest[1].describe()}: {tightest[0]} a rank)" if tightest else ""
    raise FitError(
        f"--layout auto: {what} does not fit {ranks} device{'s' * (ranks != 1)} of {format_bytes(memory)}{need}; "
        f"{enough}"
    )


class _Search:
    """All layouts of so many ranks, in the order in which they are wanted."""

    def __init__(self, job: Job, resolver: Resolver) -> None:
        self.job, self.resolver = job.replace("layout", degrees=None), resolver
        self.given = self.job.layout
        self.refused: LayoutError | None = None
        """What the check said to the first layout that would have fitted."""
        self.tightest: tuple[Need, Degrees] | None = None
        check_degrees(self.given)
        machine = resolver.machine
        # Where there are no accelerators and nobody says how many ranks, there are as many as was asked for.
        self.ranks = machine.ranks or machine.most or _asked_for(self.given)
        self.per_node = min(machine.per_node or self.ranks, self.ranks)
        memory = machine.rank_memory(self.ranks)
        self.budget = None if memory is None else memory * _SHARE

    def first(self) -> tuple[Job, Degrees] | None:
        """The first layout of all ranks that fits and that nobody refuses."""
        self.refused = self._misfit()
        if self.refused is not None:
            return None
        for degrees in sorted(self._wanted(), key=self._thinness):
            if self._fits(degrees) and (job := self._checked(degrees)) is not None:
                return job, degrees
        return None

    def _fits(self, degrees: Degrees) -> bool:
        """By the estimate; a degree of `ep` that cannot be is left to the check."""
        if degrees.dp_shard * degrees.cp % degrees.ep:
            return True
        need = self.need(degrees)
        if self.tightest is None or need.total < self.tightest[0].total:
            self.tightest = need, degrees
        return self.budget is None or need.total <= self.budget

    def _checked(self, degrees: Degrees) -> Job | None:
        """The job with these degrees if nobody refuses them; the first refusal is kept."""
        job = self.job.replace("layout", **degrees.mapping())
        try:
            self.resolver.check(job)
        except FitError:
            return None
        except LayoutError as error:
            self.refused = self.refused or error
            return None
        return job

    def _misfit(self) -> LayoutError | None:
        """Whether what was given fills the ranks, whatever the rest is."""
        given = {axis: degree for axis in AXES if (degree := getattr(self.given, axis)) is not None}
        fixed, machine = math.prod(given.values()), self.resolver.machine
        if self.ranks % fixed == 0:
            return None
        asked = " x ".join(f"{flag(axis)} {degree}" for axis, degree in given.items())
        said = f"{machine.said} {self.ranks}" if machine.ranks else f"this machine has {self.ranks} accelerators"
        return LayoutError(f"{asked} needs a multiple of {fixed} ranks and {said}")

    def refusal(self) -> LayoutError:
        """What stands against what was given, and what to give instead."""
        assert self.refused is not None
        again = nearest(
            self.job,
            lambda job: _Search(job, self.resolver).first() is not None,
            self.resolver.machine,
            only_given=True,
        )
        hint = f"nearest that works: {' or '.join(again)}" if again else self.refused.hint
        return LayoutError(f"--layout auto: {self.refused.reason}", hint)

    def _thinness(self, degrees: Degrees) -> int:
        """By how many tokens `cp` leaves a rank less than it should have; other ways to make room come first."""
        chosen = self.given.cp is None and degrees.cp > 1
        return max(0, _LEAST_TOKENS - self._tokens(degrees)) if chosen else 0

    def _tokens(self, degrees: Degrees) -> int:
        """Of a microbatch on a rank of `cp`."""
        return -(-self.job.data.seq * self.job.data.micro_batch // degrees.cp)

    def _wanted(self) -> Iterator[Degrees]:
        """Without `pp` before with, then without `tp` before the most of it, then the fewest ranks a row."""
        given, replicate = self.given, self.given.dp_replicate or 1
        nodes = self.ranks // self.per_node
        for pp in _options(given.pp, [d for d in divisors(self.ranks) if d <= nodes]):
            for tp in _options(given.tp, self._tensor_degrees(pp)):
                rest = self.ranks // (pp * tp * replicate)
                for cp in _options(given.cp, divisors(rest)):
                    dp_shard = given.dp_shard or max(1, rest // cp)
                    if pp * replicate * dp_shard * cp * tp != self.ranks:
                        continue
                    for ep in _options(given.ep, self._expert_degrees(dp_shard * cp, tp)):
                        yield Degrees(pp=pp, dp_replicate=replicate, dp_shard=dp_shard, cp=cp, tp=tp, ep=ep)

    def _tensor_degrees(self, pp: int) -> list[int]:
        able = [d for d in divisors(self.ranks // pp) if self.per_node % d == 0]
        return [1, *sorted((d for d in able if d > 1), reverse=True)]

    def _expert_degrees(self, ranks: int, tp: int) -> list[int]:
        """The most that divide experts and ranks and stay on a machine, down to one."""
        shape = self.resolver.model.experts
        if shape is None:
            return [1]
        able = [d for d in divisors(ranks) if shape.num_experts % d == 0 and d * tp <= self.per_node]
        return sorted({*able, 1}, reverse=True)

    def need(self, degrees: Degrees) -> Need:
        """What a rank of a layout is estimated to hold at most."""
        return _need(self.job, self.resolver, degrees, self._policies)

    @cached_property
    def _policies(self) -> Mapping[str, MemoryPolicy]:
        policies, wanted = self.resolver.registry.memory_policies, self.job.memory.policy
        return policies.made() if wanted == "auto" else {wanted: policies.make(wanted)}

    def reasons(self, chosen: Degrees) -> Notes:
        """A line on each axis, with the numbers that decided."""
        need, given = self.need(chosen), self.given
        room = "" if self.budget is None else f" of {format_bytes(self.budget)} ({_SHARE:.0%} of a device)"
        notes = [("auto", f"{self.ranks} ranks, {self.per_node} a machine; a rank needs {need}{room}")]
        said = {
            "pp": self._why(chosen, pp=1),
            "tp": self._why(chosen, tp=1),
            "cp": f"{self._tokens(chosen):,} tokens a rank; {self._why(chosen, cp=_below(chosen.cp))}",
        }
        if self.resolver.model.experts is not None:
            said["ep"] = "the most that divides experts and dp_shard x cp on one machine"
        said["dp_shard"] = f"the rest of {self.ranks} ranks" + (
            f", which shards the state over dp_shard x cp = {chosen.dp_shard * chosen.cp}" if chosen.cp > 1 else ""
        )
        for axis, why in said.items():
            asked = getattr(given, axis) is not None
            notes.append((axis, f"{getattr(chosen, axis)}: {'as asked for' if asked else why}"))
        return tuple(notes)

    def _why(self, chosen: Degrees, **less: int) -> str:
        """Why an axis is not smaller, by what its lower degree would need; its ranks then go to dp_shard."""
        ((axis, degree),) = less.items()
        now = getattr(chosen, axis)
        if now == 1:
            return "what a rank holds fits without"
        other = replace(chosen, **{axis: degree}, dp_shard=chosen.dp_shard * now // degree)
        need = self.need(other)
        if self.budget is None or need.total <= self.budget:
            return self._objection(other) or f"with {axis} {degree} other degrees would not fit"
        return f"with {axis} {degree} a rank would need {need}"

    def _objection(self, degrees: Degrees) -> str | None:
        """What the check says to a layout."""
        try:
            self.resolver.check(self.job.replace("layout", **degrees.mapping()))
        except (LayoutError, FitError) as error:
            return f"else {error.reason if isinstance(error, LayoutError) else error}"
        return None


def _need(job: Job, resolver: Resolver, degrees: Degrees, policies: Mapping[str, MemoryPolicy]) -> Need:
    """The estimate: state as the adapter cuts it, what is gathered beside it, and what a microbatch keeps."""
    layout, adapters = resolver.unchecked(job, degrees)
    value = dtype_bytes(layout.dtype)
    whole = parts_whole(layout, adapters)
    config = layout.model.config
    tokens = -(-job.data.seq * job.data.micro_batch // degrees.cp)
    per_rank = -(-tokens // (degrees.tp if layout.settings.sequence_parallel else 1))
    saved = _saved(job, resolver, policies, lambda policy: saved_bytes(policy, config, per_rank, value))
    # A stage has its part of the blocks, and as many microbatches in flight as there are stages.
    head = config.vocab_size * config.hidden_size / degrees.tp
    logits = 4 * min(tokens * config.vocab_size / degrees.tp, 1 << 27) + 4 * head
    cut = bool(adapters) and "weights" not in whole
    return Need(
        state=state_bytes(layout, whole) * uneven(layout.model.values, degrees.pp),
        gathered=gathered_bytes(layout) if cut else 0.0,
        rows=saved + logits,
    )


def _saved(
    job: Job, resolver: Resolver, policies: Mapping[str, MemoryPolicy], kept: Callable[[MemoryPolicy], int]
) -> int:
    """The least that a policy keeps of activations; of the one that was asked for, if one was."""
    if job.memory.policy == "auto":
        return min(resolver.registry.memory_policies.asked(kept, policies).values(), default=0)
    return kept(policies[job.memory.policy])


def _least_devices(job: Job, resolver: Resolver) -> str | None:
    """The fewest devices that would do, doubling; None if none would."""
    machine = resolver.machine
    ranks = 1
    while ranks <= _MOST_DEVICES and not machine.shared:
        # One machine that is not full could be.
        here, there = machine.per_node or _PEERS, machine.ranks or machine.most or 1
        peers = here if there > here else max(here, _PEERS)
        more = Machine(ranks=ranks, per_node=min(ranks, peers), memory=machine.memory)
        if _Search(job, resolver.on(more)).first() is not None:
            return f"{ranks:,} of them"
        ranks *= 2
    return None


def _asked_for(layout: LayoutSection) -> int:
    return resolve_degrees(layout, world_size=None, available=None).world_size


def _options(given: int | None, able: Sequence[int]) -> Sequence[int]:
    """The degree that was given, or those to choose from."""
    return able if given is None else [given]


def _below(degree: int) -> int:
    """The next degree that divides it."""
    return max((d for d in divisors(degree) if d < degree), default=1)
