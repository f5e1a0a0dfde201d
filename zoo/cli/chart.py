"""The chart of `zoo bench attention --plot`, drawn by matplotlib, which only the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.core.errors import UsageError

_SUFFIXES = (".png", ".svg", ".pdf")


def check_chart(path: str) -> None:
    """Raises UsageError, before any work is done, if no chart could be written there."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"--plot {path} needs matplotlib, which is not installed: pip install 'zoo[plot]'")
    if Path(path).suffix not in _SUFFIXES:
        raise UsageError(f"--plot {path}: the name ends in {', '.join(_SUFFIXES)}; type --plot {Path(path).stem}.png")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no directory {Path(path).parent}; make it first")


def draw_chart(answer: Mapping[str, Any], path: str) -> None:
    """Bars of each scheme: bytes the busiest rank sends, forward and backward, and seconds, predicted and measured.

    `answer` is what `--json` prints. Raises UsageError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    traffic, seconds = figure.subplots(1, 2)
    schemes = answer["schemes"]
    _bars(
        traffic, schemes, {way: [s[way]["busiest"] / 1e6 for s in schemes.values()] for way in ("forward", "backward")}
    )
    _bars(seconds, schemes, {"predicted": [s["seconds"] for s in schemes.values()]} | _measured(answer))
    traffic.set(title="sent by the busiest rank, a layer", ylabel="MB")
    seconds.set(title="forward and backward of a layer", ylabel="seconds", yscale="log")
    figure.suptitle(f"{answer['mask']['text']}, {answer['seq']:,} tokens, cp {answer['cp']}, {answer['dtype']}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot write it ({error.strerror}); give another file") from None


def _measured(answer: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds by scheme; nothing where a scheme was not measured."""
    measured = answer["measured"]
    if measured is None:
        return {}
    label = f"measured: {measured['seq']:,} tokens, {measured['ranks']} ranks"
    found = measured["schemes"]
    return {label: [found[name]["total"] if name in found else 0.0 for name in answer["schemes"]]}


def _bars(axes: Any, names: Mapping[str, Any], groups: Mapping[str, list[float]]) -> None:
    width = 0.8 / len(groups)
    for number, (label, heights) in enumerate(groups.items()):
        axes.bar([i + width * (number - (len(groups) - 1) / 2) for i in range(len(names))], heights, width, label=label)
    axes.set_xticks(range(len(names)), list(names))
    axes.legend()
