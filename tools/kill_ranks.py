"""Kills ranks of a run at random moments and compares it with one that nobody disturbed: `python tools/kill_ranks.py`.

Two runs of the same job: one left alone, one whose ranks are sent SIGKILL, one at a time, while its launcher starts
them again. By turns a kill comes some steps and part of a second after a start, or within seconds of the birth of the
ranks, or as soon as a save is being written, or as soon as one is finished (when `latest` and old saves are seen to).
In the end all tensors of the last checkpoint (weights, moments, counts) and every step's loss are the same, bit for
bit, and nothing is left behind. `--seed` chooses victims and delays; when exactly they fall is the machine's affair.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from zoo.core.run.checkpoint import Checkpoints, read_progress
from zoo.core.run.metrics import read_metrics

JOB = ("llama3", "--seq", "256", "--cp", "2", "--save-every", "1")
MOMENTS = ("any", "start", "write", "finish")
_PATIENCE_S = 600


@dataclass
class Hunt:
    """What was done to a run."""

    kills: list[dict] = field(default_factory=list)
    """Of each kill: the moment waited for, the rank, the last finished step, and what lay in `checkpoints`."""
    status: int | None = None
    said: str = ""


def command(job: tuple[str, ...], out: Path) -> list[str]:
    return [sys.executable, "-m", "zoo", "finetune", *job, "--out", str(out)]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def undisturbed(job: tuple[str, ...], out: Path) -> None:
    subprocess.run(command(job, out), check=True, capture_output=True, env=environment())


def hunt(
    job: tuple[str, ...],
    out: Path,
    kills: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    **env: str,
) -> Hunt:
    """Run a job and kill `kills` of its ranks, fewer if it ends before. `env` is added to its environment."""
    chance, result = random.Random(seed), Hunt()
    job = (*job, "--max-restarts", str(kills))
    with (out.parent / f"{out.name}.log").open("w+") as log:
        process = subprocess.Popen(command(job, out), stdout=log, stderr=log, env=environment() | env)
        before: list[int] = []
        while len(result.kills) < kills:
            moment, delay = MOMENTS[len(result.kills) % len(MOMENTS)], chance.random()
            ranks = _prey(process, before, out, moment, delay)
            if not ranks:
                break
            victim = chance.randrange(len(ranks))
            seen = _listing(out)
            os.kill(ranks[victim], signal.SIGKILL)
            result.kills.append({"moment": moment, "victim": victim, "seen": seen})
            say(f"{len(result.kills)}: {moment}, process {victim} of {len(ranks)}, {seen}")
            before += ranks
        result.status = process.wait(_PATIENCE_S)
        log.seek(0)
        result.said = log.read()
    return result


def _prey(process: subprocess.Popen, before: list[int], out: Path, moment: str, delay: float) -> list[int]:
    """Processes of the ranks at that moment, all of them new since the last kill; empty once the run is over."""
    deadline = time.monotonic() + _PATIENCE_S
    ranks: list[int] = []
    while len(ranks) < 2:
        if process.poll() is not None:
            return []
        ranks = [pid for pid in workers(process.pid) if pid not in before]
        assert time.monotonic() < deadline, "no ranks were started"
        time.sleep(0.01)
    if moment == "start":
        time.sleep(6 * delay)
        return _alive(process, ranks)
    last, first = _last(out), _listing(out)
    enough = last + (6 * delay if moment == "any" else 0)
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "write" and (now := _listing(out)) != first and any(n.startswith(".unf") for n in now):
            break
        if moment != "write" and _last(out) > enough:
            break
    time.sleep(delay * {"any": 0.5, "write": 0.1, "finish": 0.01}[moment])
    return _alive(process, ranks)


def _alive(process: subprocess.Popen, ranks: list[int]) -> list[int]:
    return [pid for pid in ranks if pid in workers(process.pid)]


def _last(out: Path) -> int:
    return max(Checkpoints(out, keep=1).steps(), default=0)


def workers(launcher: int) -> list[int]:
    """Ranks below a launcher, by its process id."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat, line = Path(f"/proc/{entry}/stat").read_text(), Path(f"/proc/{entry}/cmdline").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == launcher and "zoo.core.run.worker" in line:
            found.append(int(entry))
    return sorted(found)


def _listing(out: Path) -> list[str]:
    try:
        return sorted(path.name for path in (out / "checkpoints").iterdir())
    except FileNotFoundError:
        return []


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished save, whole."""
    metadata = FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, checkpoint_id=checkpoint / "state", no_dist=True)
    return found


def differences(quiet: Path, hunted: Path) -> list[str]:
    """What of a run that was killed is not as in the other, or was left behind."""
    wrong = []
    last = max(Checkpoints(quiet, keep=1).steps())
    if max(Checkpoints(hunted, keep=1).steps(), default=0) != last:
        return [f"the last checkpoint is not step-{last}"]
    saves = [run / "checkpoints" / f"step-{last}" for run in (quiet, hunted)]
    wanted, found = map(tensors, saves)
    if wanted.keys() != found.keys():
        wrong.append("other tensors")
    wrong += [name for name in wanted if name in found and not torch.equal(wanted[name], found[name])]
    if read_progress(saves[0]) != read_progress(saves[1]):
        wrong.append("progress.json")
    lines = [
        [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(r / "metrics.jsonl")] for r in (quiet, hunted)
    ]
    if lines[0] != lines[1]:
        wrong.append("losses")
    if _listing(quiet) != _listing(hunted):
        wrong.append(f"left behind: {_listing(hunted)}")
    if (hunted / "checkpoints" / "latest").resolve() != saves[1].resolve():
        wrong.append("latest")
    return wrong


def said(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("job", nargs="*", default=JOB, help="words of the job, after --")
    words = parser.parse_args()
    job = (*words.job, "--steps", str(words.steps))
    with tempfile.TemporaryDirectory(prefix="zoo-kills-") as folder:
        quiet, hunted = Path(folder) / "quiet", Path(folder) / "hunted"
        undisturbed(job, quiet)
        result = hunt(job, hunted, words.kills, words.seed, say=said)
        wrong = differences(quiet, hunted) if result.status == 0 else [result.said[-2000:]]
        count = len(tensors(quiet / "checkpoints" / f"step-{words.steps}"))
    restarts = result.said.count(". Restart ")
    report = {
        "job": " ".join(job),
        "kills": len(result.kills),
        "moments": Counter(kill["moment"] for kill in result.kills),
        "while_writing": sum(any(n.startswith(".unfinished") for n in kill["seen"]) for kill in result.kills),
        "before_the_first_save": sum(not kill["seen"] for kill in result.kills),
        "restarts": restarts,
        "tensors": count,
        "different": wrong,
    }
    said(json.dumps(report, indent=2))
    if words.json:
        words.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if wrong or restarts != len(result.kills) else 0


if __name__ == "__main__":
    sys.exit(main())
