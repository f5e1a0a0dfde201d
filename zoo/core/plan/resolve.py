"""From a job to its layout: degrees, batch, adapters, checked whole before any process starts.

`Resolver.check` asks everybody once: arithmetic, adapters, plugins, memory. `Resolver.resolve` adds to a refusal the
nearest layouts that nobody refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from zoo.core.contracts.entries import ParallelAdapterEntry
from zoo.core.contracts.layout import Layout, ModelFacts
from zoo.core.contracts.parallel import ParallelAdapter, StatePart
from zoo.core.errors import FitError, LayoutError
from zoo.core.humanize import format_bytes, format_count
from zoo.core.job.flags import NEEDS
from zoo.core.job.job import Job, LayoutSection
from zoo.core.machine.device import accelerator_type
from zoo.core.machine.resources import Machine
from zoo.core.mesh.degrees import Degrees, flag
from zoo.core.plan.choices import choose_data_parallel
from zoo.core.plan.memory import state_bytes
from zoo.core.plan.nearest import nearest
from zoo.core.plan.resolve_degrees import resolve_degrees
from zoo.core.plan.schemes import able_schemes
from zoo.core.registry.answers import adapter_named, applies, check_adapter, refusal, whole_parts
from zoo.core.registry.decisions import Registry

Notes = tuple[tuple[str, str], ...]
"""Topics and sentences."""

_DATA_AXES = ("dp_replicate", "dp_shard")
_PROCESS_BYTES = 200 * 2**20
"""What a rank holds before it has any weight: an interpreter with torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A layout that nobody refuses."""

    job: Job
    """With the batch and the data-parallel adapter settled."""
    layout: Layout
    adapters: Sequence[ParallelAdapter]
    """Those that apply."""
    notes: Notes = ()
    """Of degrees that were chosen: a sentence for each axis."""


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """What a layout is checked against: a model, what plugins offer, and the machine."""

    registry: Registry
    machine: Machine
    model: ModelFacts
    dtype: str
    deterministic: bool = False

    def on(self, machine: Machine) -> Resolver:
        """Return the same for another machine."""
        return replace(self, machine=machine)

    def resolve(self, job: Job) -> Resolution:
        """Return what `check` gives; a refusal names the nearest layouts that work. Raises LayoutError, FitError."""
        try:
            return self.check(job)
        except (LayoutError, FitError) as error:
            found = [] if self._never_fits(job) else nearest(job, self._works, self.machine)
            if not found:
                raise
            reason = error.reason if isinstance(error, LayoutError) else str(error)
            said = f"{reason}; nearest that works: {' or '.join(found)}"
            raise (LayoutError if isinstance(error, LayoutError) else FitError)(said) from None

    def check(self, job: Job) -> Resolution:
        """Ask everybody. Raises LayoutError or FitError by whoever refuses first, and UsageError or PluginError."""
        _check_settings(job.layout)
        machine = self.machine
        degrees = resolve_degrees(job.layout, world_size=machine.ranks, available=machine.most, said=machine.said)
        _check_processes(degrees, machine)
        job = self._settled(_with_batch(job, degrees))
        layout = self._layout(job, degrees)
        layout = replace(layout, schemes=able_schemes(self.registry, layout))
        adapters = self._adapters(layout)
        if degrees.tp > 1:
            _check_styles(layout)
        self._check_memory(layout, adapters)
        return Resolution(job=job, layout=layout, adapters=adapters)

    def unchecked(self, job: Job, degrees: Degrees) -> tuple[Layout, list[ParallelAdapter]]:
        """Return a layout and the adapters that apply to it; nobody is asked whether they can."""
        layout = self._layout(self._settled(job), degrees)
        return layout, self._applying(layout)

    def _never_fits(self, job: Job) -> bool:
        """Return whether ranks that share one memory would need more than it has, however they cut the state."""
        machine = self.machine
        if not machine.shared or machine.memory is None or machine.per_node != machine.ranks:
            return False
        return state_bytes(self._layout(self._settled(job), Degrees()), frozenset()) > machine.memory

    def _works(self, job: Job) -> bool:
        try:
            self.check(job)
        except (LayoutError, FitError):
            return False
        return True

    def _settled(self, job: Job) -> Job:
        return job.replace("layout", data_parallel=choose_data_parallel(job, self.registry))

    def _layout(self, job: Job, degrees: Degrees) -> Layout:
        """Return the layout of these degrees, without context schemes."""
        micro_batch = job.data.micro_batch
        rows = job.data.global_batch or degrees.dp * micro_batch * degrees.pp
        data_parallel = self._data_parallel(job.layout.data_parallel) or ParallelAdapter
        return Layout(
            seq=job.data.seq,
            degrees=degrees,
            settings=job.layout,
            micro_batch=micro_batch,
            microbatches=max(1, rows // degrees.dp // micro_batch),
            dtype=self.dtype,
            device=accelerator_type() or "cpu",
            deterministic=self.deterministic,
            keeps_weights_for_a_step=data_parallel.keeps_weights_for_a_step,
            model=self.model,
        )

    @cached_property
    def _made(self) -> dict[str, ParallelAdapter]:
        """Adapters that were needed so far, by name."""
        return {}

    def _data_parallel(self, name: str) -> ParallelAdapter | None:
        """Return the adapter that a job names for its data-parallel ranks, None if no plugin offers one."""
        entries = self.registry.parallel_adapters
        if name in entries and name not in self._made:
            self._made[name] = entries.make(name)
        return self._made.get(name)

    def _applying(self, layout: Layout) -> list[ParallelAdapter]:
        """Return those that apply, in the order of their names.

        The modules of the others are not imported, as far as that is known before. Of those that serve `dp_shard` a job
        names one, which may apply on one rank too, to cast.
        """
        entries, chosen = self.registry.parallel_adapters, layout.settings.data_parallel
        used = {*layout.degrees.in_use()}
        wanted = [entry.name for entry in entries if entry.name == chosen or _may_apply(entry, used)]
        self._made.update(entries.made(name for name in wanted if name not in self._made))
        found = [self._made[name] for name in wanted if name in self._made]
        return [adapter for adapter in found if applies(adapter, adapter.applies(layout))]

    def _broken_adapters(self) -> dict[str, str]:
        """Return the adapter that would serve an axis and cannot be used, by axis."""
        entries = self.registry.parallel_adapters
        return {axis: entries.broken[e.name].sentence for e in entries if e.name in entries.broken for axis in e.axes}

    def _adapters(self, layout: Layout) -> list[ParallelAdapter]:
        """Return those that apply, after each of them and every plugin agreed."""
        served = {axis for entry in self.registry.parallel_adapters for axis in entry.axes}
        for axis in layout.degrees.in_use():
            if axis not in served:
                raise LayoutError(
                    f"{flag(axis)} {layout.degrees[axis]}: no plugin here serves the axis '{axis}'; "
                    f"axes served: {', '.join(sorted(served)) or 'none'}"
                )
        adapters = self._applying(layout)
        _check_applied(layout, adapters, self._broken_adapters())
        for adapter in adapters:
            check_adapter(adapter, self.registry.parallel_adapters)
            objection = refusal(adapter_named(adapter), "check", adapter.check(layout))
            if objection is not None:
                raise LayoutError(objection)
        for plugin, sentence in self.registry.check_layout(layout):
            raise LayoutError(f"{sentence} (says plugin {plugin})")
        return adapters

    def _check_memory(self, layout: Layout, adapters: Sequence[ParallelAdapter]) -> None:
        """Refuse only what cannot fit: by weights, gradients and optimizer state alone."""
        memory = self.machine.rank_memory(layout.degrees.world_size)
        if memory is None:
            return
        held = state_bytes(layout, parts_whole(layout, adapters))
        if held > memory:
            count = format_count(sum(self.model.values.total))
            raise FitError(
                f"{self.model.name} has {count} parameters, whose weights, gradients and optimizer state take "
                f"{format_bytes(held)} on a rank of {layout.degrees.describe()} ({layout.settings.data_parallel}), "
                f"and a rank here has {format_bytes(memory)}"
            )


def _check_styles(layout: Layout) -> None:
    """Refuse a plan that would leave gradients of tensor-parallel ranks unsummed, or sum them twice."""
    model = layout.model
    if model.style_objection:
        raise LayoutError(model.style_objection)
    if not layout.settings.sequence_parallel and model.unnamed_module:
        raise LayoutError(
            f"--tp with layout.sequence_parallel=false must know whether '{model.unnamed_module}' of {model.name} "
            f"works on the residual or on heads; its plan must name it in 'tensor', as `sequence` or as `heads`"
        )


def parts_whole(layout: Layout, adapters: Sequence[ParallelAdapter]) -> frozenset[StatePart]:
    """Return what no adapter that applies cuts over dp_shard x cp."""
    return frozenset(part for adapter in adapters for part in whole_parts(adapter, adapter.whole(layout)))


def _check_settings(layout: LayoutSection) -> None:
    """Nothing that was asked for is left without a meaning."""
    plain = LayoutSection()
    for name, (axis, about) in NEEDS.items():
        value = getattr(layout, name)
        if value != getattr(plain, name) and (getattr(layout, axis) or 1) == 1:
            said = f"--{name.replace('_', '-')} {value}" if name in _FLAGGED else f"layout.{name}={value}".lower()
            raise LayoutError(f"{said} says {about}, and --{axis} is 1")


_FLAGGED = ("cp_scheme", "pp_schedule", "pp_virtual")


def _check_processes(degrees: Degrees, machine: Machine) -> None:
    """Ranks that share the memory of one machine fit it at least empty."""
    if not machine.shared or machine.memory is None:
        return
    ranks = min(degrees.world_size, machine.per_node or degrees.world_size)
    if ranks * _PROCESS_BYTES > machine.memory:
        raise FitError(
            f"{degrees.describe()}: {ranks} processes on this machine, which take {format_bytes(_PROCESS_BYTES)} each "
            f"before they hold anything, and it has {format_bytes(machine.memory)}"
        )


def _with_batch(job: Job, degrees: Degrees) -> Job:
    """Return the job with the rows of a step. Raises LayoutError if ranks cannot share them evenly."""
    unit = degrees.dp * job.data.micro_batch
    # A pipeline of N stages is full with N microbatches.
    wanted = job.data.global_batch or unit * degrees.pp
    if wanted % unit:
        raise LayoutError(
            f"--global-batch {wanted} must be a multiple of {degrees.dp} data-parallel ranks x "
            f"{job.data.micro_batch} rows a microbatch = {unit}"
        )
    return job.replace("data", global_batch=wanted)


def _may_apply(entry: ParallelAdapterEntry, used: Collection[str]) -> bool:
    """Return whether an adapter that was not named has a part in a layout of these axes."""
    own = set(entry.axes) - (set(_DATA_AXES) if "dp_shard" in entry.axes else set())
    return not entry.axes or bool(own & set(used))


def _check_applied(layout: Layout, adapters: Sequence[ParallelAdapter], broken: Mapping[str, str]) -> None:
    """Every rank has a meaning: each axis in use is served, and somebody adds up gradients wherever rows are cut."""
    needed = {*layout.degrees.in_use()} | ({"dp_shard"} if layout.degrees.cp > 1 else set())
    idle = sorted(needed - {axis for adapter in adapters for axis in adapter.axes})
    if idle and idle[0] in broken:
        raise LayoutError(f"no adapter serves the axis '{idle[0]}': {broken[idle[0]]}; see `zoo plugins`")
    if idle:
        raise LayoutError(
            f"--data-parallel {layout.settings.data_parallel}: no adapter that applies serves the axis '{idle[0]}', so "
            f"its ranks would not add up their gradients; see `zoo plugins`"
        )
