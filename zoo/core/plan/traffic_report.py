"""What a prepared job sends in a step, by the rank that sends most: one of each stage of a pipeline is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from zoo.core.contracts.account import Account, Flow, Microbatch
from zoo.core.contracts.parallel import ParallelAdapter
from zoo.core.humanize import format_bytes, table
from zoo.core.machine.device import accelerator_type
from zoo.core.mesh.degrees import AXES, Degrees
from zoo.core.model.inventory import meta_model
from zoo.core.plan.prepared import Prepared
from zoo.core.plan.traffic import sent, step_traffic
from zoo.core.sequence.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One rank's step, rows that are one document each, routers that are balanced."""

    rank: int
    sent: float
    """Bytes in all."""
    flows: tuple[tuple[Flow, int, float], ...]
    """Each with the ranks of its group and the bytes that it has this rank send; the most first."""
    silent: tuple[str, ...]
    """Adapters that apply and do not say what they send."""

    def __str__(self) -> str:
        """Return the flows as a table."""
        if not self.flows:
            return "no rank sends anything in a step"
        rows = [
            [flow.kind, flow.axis, str(ranks), flow.what, format_bytes(flow.payload), format_bytes(bytes_sent)]
            for flow, ranks, bytes_sent in self.flows
        ]
        head = f"rank {self.rank} sends most, {format_bytes(self.sent)} a step:"
        silent = f"\nnot said by {', '.join(self.silent)}" if self.silent else ""
        return f"{head}\n{table(('COLLECTIVE', 'GROUP', 'RANKS', 'OF WHAT', 'PAYLOAD', 'SENT'), rows)}{silent}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = [asdict(flow) | {"ranks": ranks, "sent": bytes_sent} for flow, ranks, bytes_sent in self.flows]
        return {"rank": self.rank, "sent": self.sent, "flows": rows, "silent": list(self.silent)}


def report(prepared: Prepared) -> Report:
    """The account of the rank that sends most."""
    found = [_report(account, prepared) for account in _accounts(prepared)]
    return max(found, key=lambda one: one.sent)


def _accounts(prepared: Prepared) -> Iterator[Account]:
    job, degrees = prepared.job, prepared.layout.degrees
    seq, rows = job.data.seq, job.data.micro_batch
    documents = tuple((i * seq, (i + 1) * seq) for i in range(rows))
    batch = Microbatch(mask=Mask(seq * rows, documents, causal=job.attention.mask != "full"))
    model = meta_model(prepared.spec, prepared.config)
    for rank in _ranks(degrees):
        yield step_traffic(
            prepared.spec,
            prepared.config,
            layout=prepared.layout,
            adapters=prepared.adapters,
            policy=prepared.policy,
            batches=[batch] * (prepared.layout.microbatches),
            rank=rank,
            device=accelerator_type() or "cpu",
            model=model,
        )


def _ranks(degrees: Degrees) -> list[int]:
    """Of each stage of a pipeline the first, the middle and the last rank of `cp`, whose shares of a row may differ."""
    places = [{"pp": pp, "cp": cp} for pp in range(degrees.pp) for cp in sorted({0, degrees.cp // 2, degrees.cp - 1})]
    numbers = []
    for place in places:
        number = 0
        for axis in AXES:
            number = number * getattr(degrees, axis) + place.get(axis, 0)
        numbers.append(number)
    return numbers


def _report(account: Account, prepared: Prepared) -> Report:
    merged: dict[tuple[str, str, str], Flow] = {}
    for flow in account.flows:
        key = flow.kind, flow.axis, flow.what
        before = merged.get(key)
        payload, messages = (before.payload, before.messages) if before else (0, 0)
        merged[key] = Flow(
            kind=flow.kind,
            axis=flow.axis,
            what=flow.what,
            messages=messages + flow.messages,
            payload=payload + flow.payload,
        )
    rows = [(flow, size := account.size(flow.axis), sent(flow.kind, size, flow.payload)) for flow in merged.values()]
    return Report(
        rank=account.number,
        sent=sum(row[2] for row in rows),
        flows=tuple(sorted(rows, key=lambda row: -row[2])),
        silent=tuple(a.name for a in prepared.adapters if type(a).account is ParallelAdapter.account),
    )
