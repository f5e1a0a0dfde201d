"""What a job leaves open: kernel, scheme, adapters, memory policy; each chosen with a reason, also against others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from zoo.core.contracts.account import dtype_bytes
from zoo.core.contracts.attention import AttentionBackend, AttentionProblem
from zoo.core.contracts.models import ModelConfig
from zoo.core.contracts.parallel import MemoryPolicy, ParallelAdapter
from zoo.core.errors import UsageError, did_you_mean
from zoo.core.job.job import Job
from zoo.core.machine.device import accelerator_type, memory_bytes, num_cores
from zoo.core.mesh.degrees import Degrees
from zoo.core.plan.chosen import Chosen
from zoo.core.registry.answers import refusal, saved_bytes
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import PluginStatus

Named = TypeVar("Named")


def choose_attention(job: Job, registry: Registry, problems: Sequence[AttentionProblem]) -> Chosen[AttentionBackend]:
    """The backend asked for, or the one plugins choose among those that can. Raises UsageError if none can.

    It computes every layer, so it can if it can all `problems`; plugins choose by the first.
    """
    wanted = job.attention.backend
    if wanted != "auto":
        backend: AttentionBackend = registry.attention.make(wanted)
        objection = _objection(backend, problems)
        if objection is not None:
            raise UsageError(f"--attn {wanted} cannot run this job: {objection}. --attn auto chooses one that can")
        return Chosen(backend, f"{wanted} (asked for)")
    backends: dict[str, AttentionBackend] = registry.attention.made()
    reasons = registry.attention.asked(lambda backend: _objection(backend, problems), backends)
    able = _able(reasons)
    if not able:
        said = "; ".join([*(f"{name}: {reason}" for name, reason in reasons.items()), *registry.passed_over()])
        raise UsageError(f"no attention backend can run this job ({said or 'no plugin provides any'})")
    return _chosen(
        backends, reasons, registry.select_attention(problems[0], able), registry.decider("zoo_select_attention")
    )


def choose_data_parallel(job: Job, registry: Registry) -> str:
    """The adapter asked for, of those that serve dp_shard; `auto` is fsdp, or the first one where it is missing.

    Raises UsageError if it is not one of them.
    """
    wanted = job.layout.data_parallel
    names = [entry.name for entry in registry.parallel_adapters if "dp_shard" in entry.axes]
    if wanted == "auto":
        in_order = [name for name in ("fsdp", *names) if name in names]
        return next((name for name in in_order if registry.parallel_adapters.made([name])), wanted)
    if wanted not in names:
        hint = did_you_mean(wanted, names)
        raise UsageError(
            f"--data-parallel {wanted}: no plugin here offers it; "
            f"there are {', '.join(names) or 'none'}{f' ({hint})' if hint else ''}"
        )
    return wanted


def choose_policy(
    job: Job, registry: Registry, config: ModelConfig, degrees: Degrees, dtype: str
) -> Chosen[MemoryPolicy]:
    """The memory policy asked for, or the one plugins choose by the activation bytes each would keep on a rank."""
    wanted = job.memory.policy
    if wanted != "auto":
        return Chosen(registry.memory_policies.make(wanted), f"{wanted} (asked for)")
    tokens = job.data.seq * job.data.micro_batch // degrees.cp
    policies: dict[str, MemoryPolicy] = registry.memory_policies.made()
    saved = registry.memory_policies.asked(lambda p: saved_bytes(p, config, tokens, dtype_bytes(dtype)), policies)
    if not saved:
        raise UsageError("; ".join(["no plugin provides a memory policy; see `zoo plugins`", *registry.passed_over()]))
    budget = memory_bytes() // (1 if accelerator_type() else degrees.world_size)
    name = registry.select_memory_policy(saved, budget, list(saved)) or min(saved, key=lambda n: saved[n])
    gib = f"activations of about {saved[name] / 2**30:.2f} GiB of {budget / 2**30:.1f} GiB a rank"
    return Chosen(policies[name], f"{name}: {gib}")


def describe_layout(adapters: Sequence[ParallelAdapter], degrees: Degrees) -> str:
    """As `cp 8 (context, fsdp; 8 ranks on 2 cores)`."""
    names = ", ".join(adapter.name for adapter in adapters)
    cores = "" if accelerator_type() else f"{degrees.world_size} ranks on {num_cores()} cores"
    aside = "; ".join(part for part in (names, cores if degrees.world_size > 1 else "") if part)
    return f"{degrees.describe()}{f' ({aside})' if aside else ''}"


def first_reason(reasons: Iterable[str | None]) -> str | None:
    """The first reason why not, None if there is none."""
    return next((reason for reason in reasons if reason is not None), None)


def _objection(backend: AttentionBackend, problems: Sequence[AttentionProblem]) -> str | None:
    """Return why a backend cannot compute every problem; None if it can."""
    who = f"attention backend '{backend.name}'"
    return first_reason(refusal(who, "supports", backend.supports(problem)) for problem in problems)


def _able(reasons: Mapping[str, str | None]) -> list[str]:
    return [name for name, reason in reasons.items() if reason is None]


def _chosen(
    options: Mapping[str, Named], reasons: Mapping[str, str | None], decided: str | None, by: PluginStatus | None
) -> Chosen[Named]:
    """The option decided for (the first able one if nobody decides), and a sentence on all."""
    name = decided or _able(reasons)[0]
    others = [
        f"{other} {'could too' if reason is None else f'cannot: {reason}'}"
        for other, reason in reasons.items()
        if other != name
    ]
    chooser = [f"chosen by plugin {by.label}"] if decided and by else []
    aside = "; ".join([*chooser, *others])
    return Chosen(options[name], f"{name}{f' ({aside})' if aside else ''}")
