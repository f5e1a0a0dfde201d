"""Trains under every layout by the real command: `python -m tools.layout_commands [--only WORD]`.

Each line is a command with processes of its own, held against the same job in one process: the largest difference of a
number in metrics.jsonl, and whether `zoo export` (called in this process) wrote the same files. The last line is the
verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tools.layout_cases import CASES, Corpus, furthest, untimed
from zoo.cli.main import main as zoo
from zoo.core.run.metrics import read_metrics

BOUND = 1e-9


class Commands:
    """Runs in a folder, each started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = Corpus(folder)

    def trained(self, name: str, *words: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Metrics of a run and SHA-256 of the files of its exports."""
        run = self.folder / name
        _finetune(*words, "--out", run)
        return untimed(read_metrics(run / "metrics.jsonl")), _exported(run)

    @cache  # noqa: B019  (one object a process)
    def single(self, model: str, layers: int, rows: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The same in one process."""
        return self.trained(f"{model}-{layers}-{rows}", *self.corpus.command(model, layers, rows))


def _finetune(*words: object) -> None:
    command = [sys.executable, "-m", "zoo", "finetune", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}")


def _exported(run: Path) -> dict[str, str]:
    files = {}
    for dtype in ("float32", "bfloat16"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert zoo(["export", str(run), str(run / dtype), "--dtype", dtype]) == 0
        files |= {f"{dtype}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / dtype).iterdir()}
    return files


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Exit status 1 if a layout is another function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="layouts whose line has this word")
    cases = [case for case in CASES if parser.parse_args().only in str(case)]
    worst, bad = 0.0, []
    with tempfile.TemporaryDirectory(prefix="zoo-layouts-") as folder:
        commands = Commands(Path(folder))
        for number, case in enumerate(cases):
            metrics, files = commands.single(*case.job)
            before = _processor_seconds()
            found, written = commands.trained(str(number), *commands.corpus.command(*case.job), *case.words)
            distance, same = furthest(found, metrics), written == files
            worst = max(worst, distance)
            if distance >= BOUND or not same:
                bad.append(str(case))
            what = f"{case.world} ranks  {distance:.1e}  {'same files' if same else 'OTHER FILES'}"
            _say(f"{what}  {_processor_seconds() - before:5.1f} s of a core  {case}")
    _say(f"{len(cases)} layouts, largest difference {worst:.1e} of {BOUND:.0e}; {bad or 'all the same function'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
