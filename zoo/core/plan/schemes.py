"""The context scheme of every layer: asked for, or chosen by what each is forecast to cost; and the sentence on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from zoo.core.attention.answers import check_cover
from zoo.core.attention.forecast import Rates, forecast
from zoo.core.contracts.account import dtype_bytes
from zoo.core.contracts.attention import AttentionProblem, ContextScheme, Forecast
from zoo.core.contracts.layout import Layout
from zoo.core.errors import LayoutError, UsageError
from zoo.core.humanize import format_bytes, format_duration
from zoo.core.job.job import Job, LayoutSection
from zoo.core.machine.device import attention_flops, link_bytes
from zoo.core.plan.choices import first_reason
from zoo.core.plan.chosen import Chosen
from zoo.core.registry.answers import refusal
from zoo.core.registry.decisions import Registry
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.row_layout import row_layout


def choose_schemes(registry: Registry, layout: Layout, mask: str = "causal") -> Chosen[dict[int | None, ContextScheme]]:
    """The scheme for each window that layers of the model have, and a sentence on them; empty without `--cp`.

    `--cp-scheme A` means all layers, `A,B` those without and with a window. Raises UsageError if one cannot run.
    """
    plain, windowed = _wanted(layout.settings, registry)
    degree = layout.degrees.cp
    if degree == 1:
        return Chosen({}, "")
    schemes: dict[int | None, ContextScheme] = {}
    notes = []
    narrow = sorted(window for window in layout.model.windows if window is not None)
    for windows, wanted in (([None] if None in layout.model.windows else [], plain), (narrow, windowed)):
        if not windows:
            continue
        # The widest window stands for all, so that two names say everything.
        window, layers = windows[-1], sum(layout.model.windows[window] for window in windows)
        if wanted == "auto":
            scheme, why = _choose(registry, layout, mask, window)
        else:
            scheme, why = _asked_for(registry, layout, wanted, degree), "asked for"
        seen = Mask.whole(layout.seq, causal=mask != "full").with_window(window)
        check_cover(scheme, seen, degree, layout.problems[0].heads)
        schemes |= dict.fromkeys(windows, scheme)
        kind = f" of window {', '.join(map(str, windows))}" if window is not None else ""
        where = f" for {layers} layer{'s' * (layers != 1)}{kind}" if len(layout.model.windows) > 1 or kind else ""
        notes.append(f"{scheme.name}{where} ({why})")
    return Chosen(schemes, " and ".join(notes))


def able_schemes(registry: Registry, layout: Layout) -> dict[int | None, ContextScheme]:
    """A scheme that can for each window that layers have, without weighing them; empty without `--cp`.

    Raises LayoutError if there is none, or if the one asked for cannot.
    """
    plain, windowed = _wanted(layout.settings, registry)
    degree = layout.degrees.cp
    if degree == 1:
        return {}
    return {
        window: _first_able(registry, layout)
        if (wanted := plain if window is None else windowed) == "auto"
        else _asked_for(registry, layout, wanted, degree)
        for window in layout.model.windows
    }


def _first_able(registry: Registry, layout: Layout) -> ContextScheme:
    schemes, reasons = registry.context_schemes, []
    for name, scheme in schemes.made().items():
        for reason in schemes.asked(lambda scheme: _reason(scheme, layout), {name: scheme}).values():
            if reason is None:
                return cast(ContextScheme, scheme)
            reasons.append(reason)
    raise LayoutError(reasons[0] if reasons else _no_scheme(layout, registry))


def _no_scheme(layout: Layout, registry: Registry) -> str:
    said = f"--cp {layout.degrees.cp} needs a context scheme and no plugin provides one; see `zoo plugins`"
    return "; ".join([said, *registry.passed_over()])


def settled(job: Job, schemes: Mapping[int | None, ContextScheme]) -> Job:
    """The job with the schemes written in as `--cp-scheme` takes them."""
    if not schemes:
        return job
    plain = schemes.get(None)
    windowed = next((scheme for window, scheme in schemes.items() if window is not None), None)
    names = [scheme.name for scheme in (plain, windowed) if scheme is not None]
    return job.replace("layout", cp_scheme=",".join(dict.fromkeys(names)))


def rates(problem: AttentionProblem, degree: int, wire: str | None) -> Rates:
    """What this machine's ranks compute and send at, by data sheet."""
    value = dtype_bytes(problem.dtype)
    gradient = 8 if problem.dtype == "float64" else 4
    carried = dtype_bytes(wire) if wire else value
    return Rates(
        flops=attention_flops(problem.dtype, degree),
        link=link_bytes(degree),
        value_bytes=min(value, carried),
        gradient_bytes=min(gradient, carried) if wire else gradient,
    )


def load_scheme(registry: Registry, wanted: str) -> ContextScheme:
    """A scheme by `name` or `name:argument`. Raises UsageError if it takes no argument."""
    name, colon, argument = wanted.partition(":")
    if colon and not inspect.signature(registry.context_schemes.load(name)).parameters:
        raise UsageError(f"--cp-scheme {wanted}: {name} takes nothing after its name; type --cp-scheme {name}")
    scheme: ContextScheme = registry.context_schemes.make(name, *([argument] if colon else []))
    return scheme


def forecasts(schemes: Mapping[str, ContextScheme], layout: Layout, mask: Mask) -> dict[str, Forecast]:
    """What each scheme would cost a layer that sees `mask`, of the heads most have. A few ranks stand for all."""
    degree, problem = layout.degrees.cp, layout.problems[0]
    some, row = sorted({0, degree // 2, degree - 1}), replace(mask, window=None)
    found = {}
    for name, scheme in schemes.items():
        places = row_layout(
            row, layout.model.windows, degree, balance=layout.settings.cp_balance, splits_rows=scheme.splits_rows
        )
        speed = rates(problem, degree, layout.settings.cp_wire)
        found[name] = forecast(scheme, mask, places, problem.heads, speed, ranks=some)
    return found


def _wanted(settings: LayoutSection, registry: Registry) -> tuple[str, str]:
    parts = [part.strip() for part in settings.cp_scheme.split(",")]
    if len(parts) > 2:
        raise UsageError(
            f"--cp-scheme {settings.cp_scheme}: one scheme for all layers, or two: without and with a window"
        )
    for part in parts:
        if part != "auto":
            registry.context_schemes.get(part.partition(":")[0])
    return parts[0], parts[-1]


def _asked_for(registry: Registry, layout: Layout, wanted: str, degree: int) -> ContextScheme:
    scheme = load_scheme(registry, wanted)
    reason = _reason(scheme, layout)
    if reason is not None:
        raise LayoutError(f"--cp-scheme {wanted} with --cp {degree}: {reason}")
    return scheme


def _reason(scheme: ContextScheme, layout: Layout) -> str | None:
    """Why it cannot carry every kind of layer; None if it can."""
    degree = layout.degrees.cp
    who = f"context scheme '{scheme.name}'"
    return first_reason(refusal(who, "check", scheme.check(problem, layout.seq, degree)) for problem in layout.problems)


def _choose(registry: Registry, layout: Layout, kind: str, window: int | None) -> Chosen[ContextScheme]:
    asked = registry.context_schemes.asked
    schemes: dict[str, ContextScheme] = registry.context_schemes.made()
    reasons = asked(lambda scheme: _reason(scheme, layout), schemes)
    able = {name: schemes[name] for name, reason in reasons.items() if reason is None}
    mask = Mask.whole(layout.seq, causal=kind != "full").with_window(window)
    costs = asked(lambda scheme: forecasts({"": scheme}, layout, mask)[""], able)
    if not costs:
        refused = (reason for reason in reasons.values() if reason is not None)
        raise LayoutError(next(refused, None) or _no_scheme(layout, registry))
    name = registry.select_context_scheme(layout, window, costs) or min(costs, key=lambda n: costs[n].seconds)
    by = registry.decider("zoo_select_context_scheme")
    others = sorted((n for n in costs if n != name), key=lambda n: costs[n].seconds)
    said = [f"forecast for a layer and one document: {describe(costs[name])}"]
    said += [f"{other} {describe(costs[other])}" for other in others]
    said += [f"{other} cannot: {reason}" for other, reason in reasons.items() if reason is not None]
    chosen = f"chosen by plugin {by.label}; " if by else ""
    return Chosen(schemes[name], chosen + "; ".join(said))


def describe(cost: Forecast) -> str:
    """As `235 MB + 470 MB sent, 97 % hidden, 3.1 ms`."""
    ahead, back = map(format_bytes, cost.sent)
    return f"{ahead} + {back} sent, {100 * cost.hidden:.0f} % hidden, {format_duration(cost.seconds)}"
