"""What `zoo.plan` returns and `zoo plan` prints: the facts of a checked job in plain values, and the reasons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.core.humanize import format_count, format_tokens
from zoo.core.machine.device import accelerator_type
from zoo.core.plan.prepared import Prepared
from zoo.core.plan.traffic_report import Report, report


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class JobPlan:
    """A checked job, before any process starts. `print` shows it as `zoo plan` does; `to_dict` is for JSON."""

    model: str
    """The family."""
    size: str
    parameters: int
    data: str
    run: Path
    """The run directory; the same job resumes what is there."""
    seq: int
    """Tokens of a row, over all ranks."""
    rows: int
    """Rows of an optimizer step, over all ranks."""
    steps: int
    dtype: str
    """Type of the arithmetic."""
    ranks: int
    degrees: Mapping[str, int]
    """Of `pp`, `dp_replicate`, `dp_shard`, `cp`, `tp` and `ep`; 1 where an axis is not used."""
    data_parallel: str
    attention: str
    """The attention kernel."""
    context_scheme: str | None
    """How K/V travel between ranks that share a row, as `--cp-scheme` takes it; None where `cp` is 1."""
    memory: str
    """The memory policy."""
    notes: Mapping[str, str]
    """What was chosen and why: a sentence for each topic, such as `model`, `layout`, `attention`."""
    settings: Mapping[str, Mapping[str, Any]]
    """All settings by section, with nothing left open; as `config.yaml` of the run has them."""
    traffic: Mapping[str, Any] | None = None
    """What the rank that sends most sends in a step, if that was asked for."""
    traffic_table: str = ""
    """The same as text."""

    def __repr__(self) -> str:
        """Return one line with the job's name, size and layout."""
        shape = f"{self.steps:,} steps of {self.rows} rows of {format_tokens(self.seq)} tokens"
        axes = " ".join(f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1)
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}{f' ({axes})' if axes else ''}"
        return f"<JobPlan {self.model} {self.size}: {shape} on {ranks}>"

    def __str__(self) -> str:
        """Return what `zoo plan` prints."""
        return "\n".join([*self.lines(), *(["", self.traffic_table] if self.traffic_table else [])])

    def lines(self) -> list[str]:
        """Return the lines that say what will run and why, without traffic."""
        return [f"{topic:<10}{sentence}" for topic, sentence in self.notes.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return what `zoo plan --json` prints: dicts, lists, text and numbers only."""
        said: dict[str, Any] = {
            "model": self.model,
            "size": self.size,
            "parameters": self.parameters,
            "ranks": self.ranks,
            "degrees": dict(self.degrees),
            "context_scheme": self.context_scheme,
            "job": {section: dict(values) for section, values in self.settings.items()},
            "notes": dict(self.notes),
        }
        if self.traffic is not None:
            said["traffic"] = dict(self.traffic)
        plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
        return plain


def job_plan(prepared: Prepared, *, traffic: bool = False) -> JobPlan:
    """Return the facts of a prepared job; with `traffic` also what a rank sends in a step."""
    job, origin, layout = prepared.job, prepared.origin, prepared.layout
    parameters = sum(layout.model.values.total)
    sending: Report | None = report(prepared) if traffic else None
    return JobPlan(
        model=origin.entry.name,
        size=origin.size,
        parameters=parameters,
        data=str(job.data.path),
        run=prepared.out,
        seq=layout.seq,
        rows=layout.global_batch,
        steps=job.schedule.steps,
        dtype=layout.dtype,
        ranks=layout.degrees.world_size,
        degrees=layout.degrees.mapping(),
        data_parallel=layout.settings.data_parallel,
        attention=prepared.backend.name,
        context_scheme=job.layout.cp_scheme if layout.schemes else None,
        memory=prepared.policy.name,
        notes=_notes(prepared, parameters),
        settings=job.settings(),
        traffic=sending.plain() if sending else None,
        traffic_table=str(sending) if sending else "",
    )


def _notes(prepared: Prepared, parameters: int) -> dict[str, str]:
    """Return what was chosen and why, by topic, and where the model will stop if that is not what its source says."""
    said = dict(prepared.notes)
    said["model"] = f"{said['model']}, {format_count(parameters)} parameters"
    if prepared.ending:
        said["stops"] = prepared.ending
    if accelerator_type() is None:
        what = f"{prepared.origin.entry.name} {prepared.origin.size} on {prepared.job.data.path}"
        said = {"machine": f"no accelerator here, so this trains {what}, on the CPU over gloo"} | said
    return said
