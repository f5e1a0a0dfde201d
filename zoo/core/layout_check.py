"""The one check of a layout, whole, before any process starts: arithmetic, adapters, plugins, memory.

`LayoutCase.check` asks everybody once; `agreed` adds to a refusal the nearest layouts that nobody refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from zoo.core.choices import choose_data_parallel
from zoo.core.context_choice import able_schemes
from zoo.core.contracts import (
    AttentionProblem,
    ContextScheme,
    ContextSetup,
    HeadShape,
    LayoutRequest,
    ModelSpec,
    ParallelAdapter,
    ParallelAdapterEntry,
    PipelineSetup,
    Setup,
)
from zoo.core.device import accelerator_type
from zoo.core.errors import FitError, LayoutError
from zoo.core.flags import NEEDS
from zoo.core.inventory import block_shapes, cut_widths, meta_model, model_values
from zoo.core.job import Job, LayoutSection
from zoo.core.layout_search import nearest
from zoo.core.machine import Machine
from zoo.core.mesh import AXES, Degrees, resolve_degrees
from zoo.core.registry import Registry
from zoo.core.state_memory import Holding, ModelValues, Part, state_bytes
from zoo.core.units import format_bytes, format_count

_DATA_AXES = ("dp_replicate", "dp_shard")
_PROCESS_BYTES = 200 * 2**20
"""What a rank holds before it has any weight: an interpreter with torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """A layout that nobody refuses."""

    job: Job
    """With the batch and the data-parallel adapter settled."""
    degrees: Degrees
    global_batch: int
    request: LayoutRequest
    setup: Setup
    adapters: Sequence[ParallelAdapter]
    """Those that apply."""


@dataclass(frozen=True, kw_only=True)
class LayoutCase:
    """What a layout is checked against: a model, what serves here, and the machine."""

    registry: Registry
    machine: Machine
    name: str
    """Of the family."""
    spec: ModelSpec
    config: Any
    dtype: str
    deterministic: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """Without storage."""
        return meta_model(self.spec, self.config)

    @cached_property
    def values(self) -> ModelValues:
        return model_values(self.model, self.spec.plan(self.config))

    @cached_property
    def widths(self) -> Sequence[tuple[str, int]]:
        return cut_widths(self.spec, self.config, model=self.model)

    @cached_property
    def heads(self) -> Counter[HeadShape]:
        return Counter(self.spec.heads(self.config))

    @cached_property
    def windows(self) -> Mapping[int | None, int]:
        return dict(Counter(self.spec.windows(self.config)))

    def on(self, machine: Machine) -> LayoutCase:
        """The same on another machine; what is known of the model stays known."""
        other = replace(self, machine=machine)
        vars(other).update({name: value for name, value in vars(self).items() if name != "machine"})
        return other

    def applied(self, job: Job, degrees: Degrees) -> tuple[Setup, list[ParallelAdapter]]:
        """What adapters are told under these degrees, and which of them apply; nobody is asked whether they can."""
        job = job.replace("layout", data_parallel=choose_data_parallel(job, self.registry))
        rows = job.data.global_batch or degrees.dp * job.data.micro_batch * degrees.pp
        microbatches = max(1, rows // degrees.dp // job.data.micro_batch)
        pipeline = PipelineSetup(microbatches=microbatches)
        setup = _setup(job, self.dtype, pipeline, {}, self.windows)
        return setup, self._applying(degrees.mapping(), setup)

    def agreed(self, job: Job) -> Agreed:
        """What `check` gives; a refusal names the nearest layouts that work. Raises LayoutError, FitError."""
        try:
            return self.check(job)
        except (LayoutError, FitError) as error:
            found = nearest(job, self._works, self.machine)
            if not found:
                raise
            reason = error.reason if isinstance(error, LayoutError) else str(error)
            said = f"{reason}; nearest that works: {' or '.join(found)}"
            raise (LayoutError if isinstance(error, LayoutError) else FitError)(said) from None

    def check(self, job: Job) -> Agreed:
        """Ask everybody. Raises LayoutError or FitError by whoever refuses first, and UsageError or PluginError."""
        _check_settings(job.layout)
        machine = self.machine
        degrees = resolve_degrees(job.layout, world_size=machine.ranks, available=machine.most, said=machine.said)
        _check_processes(degrees, machine)
        job, global_batch = _with_batch(job, degrees)
        job = job.replace("layout", data_parallel=choose_data_parallel(job, self.registry))
        request = self._request(job, degrees, global_batch // degrees.dp // job.data.micro_batch)
        schemes = able_schemes(job, self.registry, request)
        setup = _setup(job, self.dtype, request.pipeline, schemes, self.windows)
        adapters = self._adapters(replace(request, schemes=schemes), setup)
        self._check_memory(degrees, setup, adapters)
        return Agreed(
            job=job, degrees=degrees, global_batch=global_batch, request=request, setup=setup, adapters=adapters
        )

    def _works(self, job: Job) -> bool:
        try:
            self.check(job)
        except (LayoutError, FitError):
            return False
        return True

    def _request(self, job: Job, degrees: Degrees, microbatches: int) -> LayoutRequest:
        """What adapters and plugins are asked to agree to, but for the context schemes."""
        return LayoutRequest(
            degrees=degrees.mapping(),
            seq=job.data.seq,
            micro_batch=job.data.micro_batch,
            model=self.name,
            config=self.config,
            problem=self._problem(degrees),
            heads=dict(self.heads.most_common()),
            windows=self.windows,
            experts=self.spec.experts(self.config),
            widths=self.widths if degrees.tp > 1 else (),
            sequence_parallel=job.layout.sequence_parallel,
            overlap_tensor=job.layout.overlap_tensor,
            reshard=job.layout.reshard,
            pipeline=self._pipeline(job, degrees, microbatches),
        )

    def _problem(self, degrees: Degrees) -> AttentionProblem:
        """Of the heads that most layers have, as a rank holds them; the first of several."""
        most = self.heads.most_common(1)[0][0].over(degrees.tp)
        return AttentionProblem(
            device=accelerator_type() or "cpu",
            dtype=self.dtype,
            head_dim=most.head_dim,
            num_heads=most.num_heads,
            num_kv_heads=most.num_kv_heads,
            deterministic=self.deterministic,
        )

    def _pipeline(self, job: Job, degrees: Degrees, microbatches: int) -> PipelineSetup:
        """What a pipeline must know; scores are those of a row that is one document."""
        seq = job.data.seq
        keys = [seq / 2 if window is None else min(window, seq / 2) for window in self.spec.windows(self.config)]
        heads = self.spec.heads(self.config)
        blocks, last = self._blocks if degrees.pp > 1 else ((), 0)
        return PipelineSetup(
            schedule=job.layout.pp_schedule,
            virtual=job.layout.pp_virtual,
            microbatches=microbatches,
            scores=tuple(2.0 * h.num_heads * h.head_dim * k for h, k in zip(heads, keys, strict=True)),
            blocks=blocks,
            last_values=last,
        )

    @cached_property
    def _blocks(self) -> Any:
        return block_shapes(self.model, self.spec.plan(self.config))

    @cached_property
    def _made(self) -> dict[str, ParallelAdapter]:
        """Adapters that were needed so far, by name."""
        return {}

    def _applying(self, degrees: Mapping[str, int], setup: Setup) -> list[ParallelAdapter]:
        """Those that apply, in the order of their names. The others' modules are not imported, as far as that is known.

        Of those that serve `dp_shard` a job names one, which may apply on one rank too, to cast.
        """
        entries, named = self.registry.parallel_adapters, setup.data_parallel
        if named in entries and named not in self._made:
            self._made[named] = entries.make(named)
        used = {axis for axis, degree in degrees.items() if degree > 1}
        wanted = [entry.name for entry in entries if entry.name == named or _may_apply(entry, used)]
        self._made.update(entries.made(name for name in wanted if name not in self._made))
        found = (self._made[name] for name in wanted if name in self._made)
        return [adapter for adapter in found if adapter.applies(degrees, setup)]

    def _broken_adapters(self) -> dict[str, str]:
        """Axis to the adapter that would serve it and cannot be used."""
        entries = self.registry.parallel_adapters
        return {axis: entries.broken[e.name].sentence for e in entries if e.name in entries.broken for axis in e.axes}

    def _adapters(self, request: LayoutRequest, setup: Setup) -> list[ParallelAdapter]:
        """Those that apply, after each of them and every plugin agreed."""
        served = {axis for entry in self.registry.parallel_adapters for axis in entry.axes}
        for axis in (*AXES, "ep"):
            if request.degrees[axis] > 1 and axis not in served:
                raise LayoutError(
                    f"--{axis.replace('_', '-')} {request.degrees[axis]}: no plugin here serves the axis '{axis}'; "
                    f"axes served: {', '.join(sorted(served)) or 'none'}"
                )
        adapters = self._applying(request.degrees, setup)
        _check_applied(request.degrees, adapters, setup, self._broken_adapters())
        for objection in (adapter.check(request) for adapter in adapters):
            if objection:
                raise LayoutError(objection)
        for plugin, sentence in self.registry.check_layout(request):
            raise LayoutError(f"{sentence} (says plugin {plugin})")
        return adapters

    def _check_memory(self, degrees: Degrees, setup: Setup, adapters: Sequence[ParallelAdapter]) -> None:
        """Refuse only what cannot fit: by weights, gradients and optimizer state alone."""
        memory = self.machine.rank_memory(degrees.world_size)
        if memory is None:
            return
        held = state_bytes(self.values, degrees, setup, parts_whole(adapters, setup))
        if held > memory:
            count = format_count(sum(self.values.total))
            raise FitError(
                f"{self.name} has {count} parameters, whose weights, gradients and optimizer state take "
                f"{format_bytes(held)} on a rank of {degrees.describe()} ({setup.data_parallel}), and a rank here has "
                f"{format_bytes(memory)}"
            )


def parts_whole(adapters: Sequence[ParallelAdapter], setup: Setup) -> frozenset[Part]:
    """What no adapter that applies cuts over dp_shard x cp."""
    return frozenset(part for a in adapters if isinstance(a, Holding) for part in a.whole(setup))


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


def _with_batch(job: Job, degrees: Degrees) -> tuple[Job, int]:
    unit = degrees.dp * job.data.micro_batch
    # A pipeline of N stages is full with N microbatches.
    wanted = job.data.global_batch or unit * degrees.pp
    if wanted % unit:
        raise LayoutError(
            f"--global-batch {wanted} must be a multiple of {degrees.dp} data-parallel ranks x "
            f"{job.data.micro_batch} rows a microbatch = {unit}"
        )
    return job.replace("data", global_batch=wanted), wanted


def _setup(
    job: Job,
    dtype: str,
    pipeline: PipelineSetup,
    schemes: Mapping[int | None, ContextScheme],
    windows: Mapping[int | None, int],
) -> Setup:
    return Setup(
        seq=job.data.seq,
        context=context_setup(job, schemes, windows),
        dtype=dtype,
        # Weights and optimizer state are never held below fp32.
        master_dtype="float32" if dtype == "bfloat16" else dtype,
        data_parallel=job.layout.data_parallel,
        reshard=job.layout.reshard,
        pipeline=pipeline,
        sequence_parallel=job.layout.sequence_parallel,
        overlap_tensor=job.layout.overlap_tensor,
    )


def context_setup(
    job: Job, schemes: Mapping[int | None, ContextScheme], windows: Mapping[int | None, int]
) -> ContextSetup | None:
    """How rows are shared out; None without context parallelism."""
    balance, wire = job.layout.cp_balance, job.layout.cp_wire
    return ContextSetup(schemes=schemes, windows=windows, balance=balance, wire=wire) if schemes else None


def _may_apply(entry: ParallelAdapterEntry, used: Collection[str]) -> bool:
    """Whether an adapter that was not named has a part in a layout of these axes."""
    own = set(entry.axes) - (set(_DATA_AXES) if "dp_shard" in entry.axes else set())
    return not entry.axes or bool(own & set(used))


def _check_applied(
    degrees: Mapping[str, int], adapters: Sequence[ParallelAdapter], setup: Setup, broken: Mapping[str, str]
) -> None:
    """Every rank has a meaning: each axis in use is served, and somebody adds up gradients wherever rows are cut."""
    needed = {axis for axis in (*AXES, "ep") if degrees[axis] > 1} | ({"dp_shard"} if degrees["cp"] > 1 else set())
    idle = sorted(needed - {axis for adapter in adapters for axis in adapter.axes})
    if idle and idle[0] in broken:
        raise LayoutError(f"no adapter serves the axis '{idle[0]}': {broken[idle[0]]}; see `zoo plugins`")
    if idle:
        raise LayoutError(
            f"--data-parallel {setup.data_parallel}: no adapter that applies serves the axis '{idle[0]}', so its ranks "
            f"would not add up their gradients; see `zoo plugins`"
        )
