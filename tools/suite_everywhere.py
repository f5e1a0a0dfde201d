"""Runs the suite as three machines would: alone, beside a load, and with another instruction set on one thread.

    python -m tools.suite_everywhere [TEST ...]        # all tests if none is named; those after -- go to pytest

Each way is `make test`'s own command. The load is ten processes that compute, started here and ended here. One line for
each way has its time and its verdict; what pytest said is in build/suite/WAY.log. Exit status 1 if a way failed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "suite"
RUNNER = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
"""As `make test` runs it."""
BUSY = 10
"""Processes of the load, where `make test` has two workers."""

OLD_PROCESSOR = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}
"""torch, oneDNN and MKL without the vectors of the last ten years: other kernels, which add in another order."""
OTHER_PROCESSOR = OLD_PROCESSOR | {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2"}

WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "alone": (0, {}),
    "busy": (BUSY, {}),
    "sse": (0, OLD_PROCESSOR),
    "avx2": (0, OTHER_PROCESSOR),
}
"""Name to the number of busy processes beside the suite, and variables it runs with."""


def _compute(parent: int) -> None:
    """Until killed, or whoever started it is."""
    while os.getppid() == parent:
        sum(range(100_000))


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that compute until the block ends."""
    context = multiprocessing.get_context("spawn")
    busy = [context.Process(target=_compute, args=(os.getpid(),), daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.join()


def run(way: str, tests: list[str]) -> bool:
    """Run the suite one way and say how it went."""
    processes, variables = WAYS[way]
    command = [sys.executable, "-m", "pytest", *RUNNER, "--durations=30", *tests]
    began = time.monotonic()
    with load(processes), (LOGS / f"{way}.log").open("w") as log:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log, check=False
        ).returncode
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    beside = f"beside {processes} busy processes" if processes else "alone"
    words = " ".join(f"{name}={value}" for name, value in variables.items())
    verdict = "green" if status == 0 else f"FAILED with {status}, see {LOGS.relative_to(ROOT)}/{way}.log"
    sys.stdout.write(f"{way:6} {minutes:3}m{seconds:02}s  {verdict}  ({beside}{'; ' + words if words else ''})\n")
    sys.stdout.flush()
    return status == 0


def main() -> int:
    """Exit status 1 if a way failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, action="append", help="only this; may be given several times")
    parser.add_argument("tests", nargs="*", help="files or tests, and options of pytest after --")
    words = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    results = [run(way, words.tests) for way in words.way or WAYS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
