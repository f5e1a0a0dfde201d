"""The answer of `zoo bench attention` as lines for people and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from zoo.core.bench.compare import Answer, Measured
from zoo.core.bench.figures import Figures, layer_flops
from zoo.core.humanize import format_bytes, format_duration, format_tokens, table

_WORK = ("SCHEME", "LAYOUT", "FLOPS", "LARGEST", "HIDDEN", "PREDICTED")
_BYTES = ("SCHEME", "PASS", "BUSIEST", "ALL RANKS", "NEEDED", "BOUND")
_TIMES = ("SCHEME", "FORWARD", "BACKWARD", "BOTH", "SLOWDOWN")

_LEGEND = (
    "NEEDED: K/V rows (backward: and gradients) once to each rank whose queries see them; BOUND: once. "
    "Schemes that deal out heads move queries too."
)


def lines(answer: Answer) -> list[str]:
    """What was asked, work and forecast, bytes, what cannot run and why, and the times of real ranks."""
    found = _head(answer)
    if answer.schemes:
        work = [_work_cells(name, figures) for name, figures in answer.schemes.items()]
        traffic = [cells for name, figures in answer.schemes.items() for cells in _byte_cells(name, figures)]
        found += ["", table(_WORK, work), "", table(_BYTES, traffic), _LEGEND]
    if answer.refused:
        found += ["", *_refusals(answer.refused)]
    return [*found, "", *_times(answer.measured)] if answer.measured else found


def as_plain(answer: Answer) -> dict[str, Any]:
    """Everything as one object, numbers at full precision; bytes, seconds and FLOPs are of one layer."""
    problem, heads = answer.problem, answer.problem.heads
    return {
        "model": answer.model,
        "heads": asdict(heads),
        "dtype": problem.dtype,
        "device": problem.device,
        "seq": answer.mask.length,
        "mask": {
            "text": answer.words.text,
            "seed": answer.seed,
            "documents": len(answer.mask.documents),
            "area": answer.mask.area,
        },
        "cp": answer.cp,
        "balance": answer.balance,
        "attention": answer.backend,
        "rates": asdict(answer.rates),
        "schemes": {name: _plain_figures(figures, answer) for name, figures in answer.schemes.items()},
        "refused": answer.refused,
        "measured": asdict(answer.measured) if answer.measured else None,
    }


def _head(answer: Answer) -> list[str]:
    problem, rates = answer.problem, answer.rates
    model = f", as {answer.model}" if answer.model else ""
    flops = layer_flops(answer.mask.area * problem.num_heads, problem.heads)
    seed = f", seed {answer.seed}" if answer.words.drawn else ""
    said = {
        "heads": f"{problem.num_heads} query, {problem.num_kv_heads} key/value, of {problem.head_dim} numbers{model}; "
        f"{problem.dtype}",
        "mask": f"{answer.words.describe(answer.mask)}{seed}",
        "layout": f"cp {answer.cp}, balance {answer.balance}",
        "kernel": answer.why_backend,
        "work": f"{_si(flops, 'FLOP')} a layer, forward and backward, at least",
        "rates": f"assumed of each rank: {_si(rates.flops, 'FLOP/s')} of attention, {format_bytes(rates.link)}/s out; "
        f"{rates.value_bytes} bytes a number of K/V, {rates.gradient_bytes} of dK/dV",
    }
    return [f"{topic:<8}{sentence}" for topic, sentence in said.items()]


def _work_cells(name: str, figures: Figures) -> list[str]:
    cost = figures.forecast
    shares = [f"{figures.excess:.2f}", f"{figures.imbalance:.2f}", f"{100 * cost.hidden:.0f} %"]
    return [name, figures.layout, *shares, format_duration(cost.seconds)]


def _byte_cells(name: str, figures: Figures) -> list[list[str]]:
    ways = {"forward": figures.forward, "backward": figures.backward}
    return [
        [name, way, *map(format_bytes, (found.busiest, found.total, found.needed, found.bound))]
        for way, found in ways.items()
    ]


def _times(measured: Measured) -> list[str]:
    fastest = min((timing.total for timing in measured.schemes.values()), default=0.0)
    rows = [
        [name, *map(format_duration, (timing.forward, timing.backward, timing.total)), f"{timing.total / fastest:.2f}"]
        for name, timing in measured.schemes.items()
    ]
    ranks = f"{measured.ranks} rank{'s' * (measured.ranks != 1)} of this machine"
    head = f"measured on {ranks}, a row of {format_tokens(measured.seq)} tokens, median of {measured.repeats}:"
    return [head, *([table(_TIMES, rows)] if rows else []), *_refusals(measured.refused)]


def _refusals(refused: dict[str, str]) -> list[str]:
    return [f"{name} cannot: {reason}" for name, reason in refused.items()]


def _plain_figures(figures: Figures, answer: Answer) -> dict[str, Any]:
    heads, cost = answer.problem.heads, figures.forecast
    return {
        "layout": figures.layout,
        "executed_flops": layer_flops(figures.executed, heads),
        "minimal_flops": layer_flops(figures.minimal, heads),
        "executed_over_minimal": figures.excess,
        "largest_over_mean": figures.imbalance,
        "forward": asdict(figures.forward),
        "backward": asdict(figures.backward),
        "hidden": cost.hidden,
        "seconds": cost.seconds,
        "compute_seconds": cost.compute_seconds,
    }


def _si(count: float, unit: str) -> str:
    """As `35.2 TFLOP`."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}"
