"""Ask runs to stop at drawn moments from exec to exit, and check what docs/launch.md promises of it.

    python tools/stop_anywhere.py [--times 30] [--seed 0] [--json FILE]

Each time a run of a few steps is started, on one process or on two ranks by turns, and gets a signal after a drawn part
of what such a run takes from start to end, or, every other time, soon after a drawn step. It must save and end with 75,
or end with 75 and say that there was nothing to save yet, or end with 0 if the signal came in the last step or later.
No traceback, no process is left, what is saved is as many steps as were reported. Before Python has begun zoo, which is
counted, the signal itself ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.kill_ranks import command, environment, said
from zoo.core.launch.signals import NOTHING_YET
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

STEPS = 12
JOB = ("llama3", "--seq", "256", "--steps", str(STEPS), "--save-every", "4")
LAYOUTS = ((), ("--cp", "2"))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def steps_of(run: Path) -> int:
    try:
        return len(read_metrics(run / "metrics.jsonl"))
    except (OSError, ValueError):
        return 0


def undisturbed(folder: Path) -> dict[tuple[str, ...], float]:
    """Seconds that each layout's run takes from start to end."""
    took = {}
    for layout in LAYOUTS:
        began = time.monotonic()
        subprocess.run(
            command((*JOB, *layout), folder / f"quiet-{len(took)}"), check=True, capture_output=True, env=environment()
        )
        took[layout] = time.monotonic() - began
    return took


def stop(
    layout: tuple[str, ...], run: Path, number: signal.Signals, steps: int, after_s: float
) -> tuple[str, list[str]]:
    """Start a run and ask it to stop. Return how it ended, and what was wrong with that."""
    with (run.parent / f"{run.name}.log").open("w+") as log:
        process = subprocess.Popen(
            command((*JOB, *layout), run), stdout=log, stderr=log, env=environment() | {"ZOO_STOP_ANYWHERE": run.name}
        )
        while steps_of(run) < steps and process.poll() is None:
            time.sleep(0.01)
        time.sleep(after_s)
        before, over = steps_of(run), process.poll() is not None
        process.send_signal(number)
        status = process.wait()
        log.seek(0)
        text = log.read()
    wrong = [word for word in ("Traceback", "KeyboardInterrupt", "fault of zoo") if word in text]
    if left := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _belongs(pid, run.name)]:
        wrong.append(f"processes left: {left}")
    saved = max(Checkpoints(run, keep=1).steps(), default=0)
    if saved != steps_of(run):
        wrong.append(f"{steps_of(run)} steps reported, {saved} saved")
    if over:
        return "over before the signal", wrong
    if status == 75:
        how = "nothing to save yet" if NOTHING_YET in text else "saved"
        return how, wrong + ([] if how == "saved" or saved == 0 else [f"step {saved} is there"])
    if status == 0:
        return "done", wrong + ([] if before >= STEPS - 2 else [f"went on from step {before} to the end"])
    if -status == number and not text:
        return "before zoo began", wrong
    return f"status {status}", [*wrong, text[-1000:]]


def _belongs(pid: int, name: str) -> bool:
    try:
        return f"ZOO_STOP_ANYWHERE={name}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    chance = random.Random(words.seed)
    ends: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory(prefix="zoo-stops-") as folder:
        took = undisturbed(Path(folder))
        for time_ in range(words.times):
            layout, number = LAYOUTS[time_ % len(LAYOUTS)], SIGNALS[time_ // 4 % len(SIGNALS)]
            steps = 0 if time_ // 2 % 2 else chance.randint(1, STEPS)
            after_s = (0.5 if steps else took[layout]) * chance.random()
            how, wrong = stop(layout, Path(folder) / f"run-{time_}", number, steps, after_s)
            ends[how] += 1
            case = f"{number.name} {after_s:.2f} s after step {steps}, {' '.join(layout) or 'one process'}"
            faults += [f"{case}: {what}" for what in wrong]
            said(f"{time_ + 1}: {case}: {how} {wrong}")
    report = {"times": words.times, "seed": words.seed, "ends": dict(ends), "faults": faults}
    said(json.dumps(report, indent=2))
    if words.json:
        words.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
