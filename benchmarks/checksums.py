"""What checksums cost a save, a resume and an export, beside the code before them, in one run.

Two trees of zoo, this one and `--before` (a checkout of the code to compare with), each serve in a process of their
own, with the imports done and one thread. They are asked by turns (A B, B A, ...) to save a Llama with AdamW's state,
to resume from that save, and to write its weights as a Hugging Face directory, so that a busy machine is busy for both.
Medians; `cpu` is the process's own time, which other programs change less. `sum_alone` is what CRC-32 of the same bytes
takes from memory, in the same run: what no checksum can do without. Only ratios mean anything.

    git worktree add /tmp/before COMMIT
    python benchmarks/checksums.py --before /tmp/before --json benchmarks/results/checksums.json

Both trees read and write in `--dir`, a folder on the disk that is meant. What they wrote is in the page cache when it
is resumed from; `--cold` drops each file from it first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
WORK = ("save", "resume", "export")


def config(megabytes: int) -> dict:
    """A Llama whose weights and two moments in fp32 take about so much."""
    hidden = 512
    # A layer of such a Llama has about 11.2 times the square of its width.
    layers = max(1, round((megabytes * 1e6 / 12 - 2 * 8000 * hidden) / (11.2 * hidden**2)))
    return {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden - 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    }


def serve(folder: Path, megabytes: int) -> None:
    """Do what lines on stdin ask for; answer each with seconds and seconds of a core."""
    import torch
    import torch.distributed as dist

    from zoo.conversion.hf.converter import CONVERTER
    from zoo.conversion.run.converter import RunConverter
    from zoo.core.job.job import OptimSection, ScheduleSection
    from zoo.core.run import checkpoint
    from zoo.core.run.checkpoint import Checkpoints
    from zoo.core.run.optim import build_optimizer, build_schedule
    from zoo.core.run.step import TrainState
    from zoo.models.llama3.model import SPEC

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    fields = config(megabytes)
    parsed = SPEC.parse(fields)
    torch.manual_seed(0)
    model = SPEC.build(parsed)
    state = TrainState(
        model,
        build_optimizer(model, OptimSection(lr=1e-4)),
        build_schedule(ScheduleSection(steps=10)),
        lr=1e-4,
        clip=1.0,
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    hub = {"config.json": json.dumps(fields).encode()}
    made = folder / "run/checkpoints/step-0"

    def save() -> None:
        Checkpoints(folder / "run", keep=1).save(state, {"step": 0}, hub)

    def resume() -> None:
        checkpoint.load(state, made)

    def export() -> None:
        opened = RunConverter().open(made)
        if getattr(opened, "checksums", None) is not None:
            from zoo.core.storage.finished import require_intact

            require_intact(opened.checksums, of_run=opened.own_names, threads=1)
        CONVERTER.export(SPEC, parsed, opened.tensors, folder / "hf", files={}, dtype=None, threads=1)

    def written() -> int:
        return sum(path.stat().st_size for path in made.rglob("*") if path.is_file())

    work = {"save": save, "resume": resume, "export": export}
    print("ready", flush=True)
    for line in sys.stdin:
        asked = line.strip()
        if asked == "save":
            shutil.rmtree(folder / "run", ignore_errors=True)
        if asked == "export":
            shutil.rmtree(folder / "hf", ignore_errors=True)
        start, start_cpu = time.perf_counter(), time.process_time()
        work[asked]()
        took = time.perf_counter() - start, time.process_time() - start_cpu
        print(json.dumps([*took, written()]), flush=True)


class Tree:
    """A checkout whose code works in a process of its own."""

    def __init__(self, root: Path, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        words = [sys.executable, __file__, "--serve", str(folder), "--megabytes", str(megabytes)]
        env = os.environ | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self._answer() == "ready"

    def ask(self, what: str) -> tuple[float, float, int]:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        seconds, cpu, size = json.loads(self._answer())
        return seconds, cpu, size

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.folder.name} ended with {self._process.wait()}")
        return line.strip()


def drop(folder: Path) -> None:
    """Take the files below a folder out of the page cache."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sum_alone(size: int) -> float:
    """Seconds of a core for CRC-32 of so many bytes in memory."""
    block = os.urandom(16 << 20)
    start = time.process_time()
    for _ in range(4):
        zlib.crc32(block)
    return (time.process_time() - start) / (4 * len(block)) * size


def summary(rows: list[dict]) -> dict:
    result = {}
    for what in WORK:
        of = {tree: [row for row in rows if row["what"] == what and row["tree"] == tree] for tree in ("before", "now")}
        found = {}
        for key in ("s", "cpu_s"):
            medians = {tree: statistics.median(row[key] for row in of[tree]) for tree in of}
            found |= {f"{tree}_{key}": value for tree, value in medians.items()}
            found[f"now_over_before_{key}"] = medians["now"] / medians["before"]
        result[what] = found
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--megabytes", type=int, default=500, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--dir", type=Path, help="a folder on the disk that is meant")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve:
        serve(words.serve, words.megabytes)
        return 0
    if words.before is None:
        parser.error("--before DIR: a checkout of the code to compare with")
    rows, sums = [], []
    with tempfile.TemporaryDirectory(dir=words.dir) as name:
        roots = {"before": words.before.resolve(), "now": TREE}
        trees = {tree: Tree(root, Path(name) / tree, words.megabytes) for tree, root in roots.items()}
        for number in range(-1, words.rounds):  # the first is for what only a first time costs
            for what in WORK:
                for tree in sorted(trees, reverse=number % 2 == 1):
                    if words.cold and what != "save":
                        drop(trees[tree].folder)
                    seconds, cpu, size = trees[tree].ask(what)
                    if number >= 0:
                        rows.append({"what": what, "tree": tree, "s": seconds, "cpu_s": cpu})
            sums.append(sum_alone(size))
        for tree in trees.values():
            tree.end()
    report = {
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
        "bytes": size,
        "rounds": words.rounds,
        "cold": words.cold,
        "sum_alone_s": statistics.median(sums),
        **summary(rows),
        "rows": rows,
    }
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=2))
    if words.json:
        words.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
