"""The balanced layout beside head-tail and contiguous, on packed rows of real document lengths.

Per distribution, length and degree: largest/mean attention area, and the K/V rows that must travel, over all readers,
as a share of (P-1) * N (every row to every rank). The floor is what no layout with largest/mean <= 1.05 can undercut.
`--json FILE` writes every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from zoo.core.attention.needs import remote_needs
from zoo.core.sequence.balance import balanced
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask, visible_before

LENGTHS = (65_536, 1_048_576)
DEGREES = (8, 64)
BYTES_PER_TOKEN = 3.5
TIMED, REPEATS = 20, 5
"""The solver is timed on the first draws, and of some runs the best counts: other processes are no fault of its."""


@lru_cache
def stdlib_lengths() -> tuple[int, ...]:
    """Tokens, about, of the standard library's source files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return tuple(max(1, round(path.stat().st_size / BYTES_PER_TOKEN)) for path in files)


def files(rng: random.Random, _length: int) -> Iterator[int]:
    while True:
        yield from rng.sample(stdlib_lengths(), len(stdlib_lengths()))


def log_normal(rng: random.Random, _length: int) -> Iterator[int]:
    while True:
        yield max(1, round(rng.lognormvariate(math.log(2000), 1.2)))


def giant(rng: random.Random, length: int) -> Iterator[int]:
    """One document of 30 to 90 % of the row somewhere among documents of 50 to 500 tokens."""
    size = round(length * rng.uniform(0.3, 0.9))
    before = rng.randint(0, length - size)
    while before > 0:
        before -= (tiny := rng.randint(50, 500))
        yield tiny
    yield size
    while True:
        yield rng.randint(50, 500)


def short(rng: random.Random, _length: int) -> Iterator[int]:
    while True:
        yield rng.randint(50, 500)


KINDS = {"files": files, "log-normal": log_normal, "giant": giant, "short": short}


def packed(kind: str, length: int, rng: random.Random) -> Mask:
    """A row of documents of these lengths; the last one is cut where the row ends."""
    documents, at = [], 0
    for size in KINDS[kind](rng, length):
        documents.append((at, min(at + size, length)))
        at += size
        if at >= length:
            return Mask(length, tuple(documents))
    raise AssertionError("document lengths do not end")


def areas(mask: Mask, layout: SequenceLayout) -> list[int]:
    """Each rank's visible pairs of a causal mask, by a way of counting that is not the solver's."""
    starts = np.array([start for start, _ in mask.documents])
    sizes = np.diff(np.append(starts, mask.length))
    whole = np.append(0, np.cumsum(sizes * (sizes + 1) // 2))

    def before(position: int) -> int:
        document = int(starts.searchsorted(position, "right")) - 1
        return int(whole[document]) + visible_before(position - int(starts[document]))

    return [sum(before(stop) - before(start) for start, stop in part) for part in layout.chunks]


def travelling(mask: Mask, layout: SequenceLayout) -> int:
    """K/V rows that must travel, each counted once a reader."""
    return sum((need.rows[1] - need.rows[0]) * len(need.ranks) for need in remote_needs(mask, layout))


def least_travelling(mask: Mask, degree: int, *, imbalance: float = 1.05) -> float:
    """A lower bound of `travelling` over all layouts of a causal mask with that largest/mean area.

    A rank whose last token of a document is number e reads e rows less its own. What lies behind the e of the rank that
    ends i-th from last is the work of i ranks at most, so the area before that e is the document's less i ranks' worth.
    """
    most = imbalance * mask.area / degree
    rows = 0.0
    for start, stop in mask.documents:
        area = (stop - start) * (stop - start + 1) / 2
        before = area - most * np.arange(1, math.ceil(area / most))
        rows += float(np.sum((np.sqrt(8 * before + 1) - 1) / 2))
    return rows


def imbalance(mask: Mask, layout: SequenceLayout) -> float:
    found = areas(mask, layout)
    return max(found) * len(found) / sum(found)


def solve(mask: Mask, degree: int, repeats: int) -> tuple[SequenceLayout, float]:
    """The layout, and the CPU seconds of the best of some repeats."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        layout = balanced([(mask, 1)], degree)
        best = min(best, time.process_time() - start)
    return layout, best


def measure(kind: str, length: int, degree: int, draws: int) -> dict[str, object]:
    """Figures of one distribution, length and degree over all draws."""
    rng = random.Random(f"{kind} {length} {degree}")
    rows: dict[str, list[float]] = {}
    for draw in range(draws):
        mask = packed(kind, length, rng)
        layout, seconds = solve(mask, degree, REPEATS if draw < TIMED else 1)
        layouts = {
            "contiguous": SequenceLayout.contiguous(length, degree),
            "head_tail": SequenceLayout.head_tail(length, degree),
            "balanced": layout,
        }
        found = {"chunks_per_rank": sum(map(len, layout.chunks)) / degree}
        if draw < TIMED:
            found["solver_ms"] = 1e3 * seconds
        for name, each in layouts.items():
            found[f"{name}_imbalance"] = imbalance(mask, each)
            found[f"{name}_share"] = travelling(mask, each) / ((degree - 1) * length)
        found["floor_share"] = least_travelling(mask, degree) / ((degree - 1) * length)
        if found["contiguous_share"]:
            found["ratio"] = found["balanced_share"] / found["contiguous_share"]
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    figures = {
        key: dict(zip(("median", "p99", "max"), map(float, np.quantile(values, (0.5, 0.99, 1.0))), strict=True))
        for key, values in rows.items()
    }
    # Ratios of single draws explode where contiguous cuts happen to fall between documents.
    figures["ratio"]["of_means"] = sum(rows["balanced_share"]) / sum(rows["contiguous_share"])
    if floor := sum(rows["floor_share"]):
        figures["floor_share"]["ratio_of_means"] = sum(rows["balanced_share"]) / floor
    return {"kind": kind, "length": length, "degree": degree, "draws": draws, **figures}


def line(row: dict) -> str:
    shares = ", ".join(
        f"{name} {row[f'{name}_share']['median']:.4f}" for name in ("contiguous", "head_tail", "balanced", "floor")
    )
    ratio = row["ratio"]
    floor = f"{row['floor_share']['ratio_of_means']:.2f}" if "ratio_of_means" in row["floor_share"] else "inf"
    return (
        f"{row['kind']:>10} {row['length'] // 1024:>5}k cp {row['degree']:>2}: largest/mean p99 "
        f"{row['balanced_imbalance']['p99']:.3f} max {row['balanced_imbalance']['max']:.3f} (contiguous "
        f"{row['contiguous_imbalance']['median']:.2f}, head-tail {row['head_tail_imbalance']['median']:.2f}); rows "
        f"of contiguous: median {ratio['median']:.2f} p99 {ratio['p99']:.2f} max {ratio['max']:.2f} mean "
        f"{ratio['of_means']:.2f}; {floor} times the floor; "
        f"share {shares}, max {row['balanced_share']['max']:.3f}; "
        f"{row['chunks_per_rank']['median']:.2f} chunks a rank; {row['solver_ms']['median']:.1f} ms, "
        f"max {row['solver_ms']['max']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for kind in KINDS:
        for length in LENGTHS:
            for degree in DEGREES:
                found.append(measure(kind, length, degree, args.draws))
                print(line(found[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
