"""Conversion of an 8 GiB Mixtral-shaped checkpoint beside `cp` and `sync`, and of 1 GiB beside transformers.

The checkpoint is random bytes in the shapes of three layers of Mixtral 8x7B (intermediate 13,312), made on the disk
that --dir names, in both forms that exist: one tensor an expert, and all experts fused. Every side is a command in a
process of its own, timed from start to end, imports of torch included, by turns with the others. Cold: the source is
dropped from the page cache before each turn; warm: it was just read. Before each turn the disk is synced; the turn ends
when what it wrote is on the disk (zoo syncs each file itself). zoo also reads back and compares all it wrote, through
the page cache; cp compares nothing. Memory is the largest RssAnon in /proc/PID/status, sampled every 2 ms.

`cp` has two turns in a row: the second may find the pages that the first one's copy had, which was just removed. On a
virtual machine that gives unused memory back to its host that is a large help; zoo takes its own pages again and
leaves none to others.
`--json FILE` writes every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LARGE = {"hidden_size": 4096, "intermediate_size": 13_312, "num_hidden_layers": 3}
SMALL = {"hidden_size": 2048, "intermediate_size": 3_328, "num_hidden_layers": 3}
FIELDS = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32_000,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


def make_checkpoint(folder: Path, fields: dict, *, form: int) -> int:
    """Random bytes under the names and shapes of a form (0: an expert at a time, 1: fused). Returns their number."""
    import numpy as np

    from zoo.conversion.disk.writer import SHARD_BYTES, Outgoing, plan_shards, write_index, write_json
    from zoo.core.model.inventory import meta_model
    from zoo.core.model.rules import RuleBook
    from zoo.models.mixtral.model import SPEC

    config = SPEC.parse(fields)
    rules = (SPEC.rules(config), *SPEC.forms(config))[form]
    book = RuleBook(rules, {name: tuple(p.shape) for name, p in meta_model(SPEC, config).named_parameters()})
    shards = plan_shards([Outgoing(n, s, "bfloat16") for n, s in book.hub_shapes.items()], SHARD_BYTES)
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                for start in range(0, tensor.length, 64 << 20):
                    file.write(random.bytes(min(64 << 20, tensor.length - start)))
    write_index(folder, shards)
    write_json(folder / "config.json", fields)
    return sum(shard.size for shard in shards)


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(*command: object) -> dict:
    """Seconds and peak anonymous MiB of a command in a process of its own, what it wrote being on the disk."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "anon_mib": peak / 1024}


def turn(side: str, source: Path, out: Path, *, cold: bool) -> dict:
    os.sync()
    if cold:
        drop(source)
    commands = {
        "zoo": (sys.executable, "-m", "zoo", "import", source, out),
        "cp": (cp := ("sh", "-c", f"cp -r '{source}' '{out}' && sync -f '{out}'")),
        "cp again": cp,
        "transformers": ("sh", "-c", f"exec '{sys.executable}' -c \"$0\" '{source}' '{out}'", TRANSFORMERS),
    }
    result = timed(*commands[side])
    if side == "transformers":
        start = time.perf_counter()
        subprocess.run(["sync", "-f", str(out)], check=True)
        result["seconds"] += time.perf_counter() - start
    shutil.rmtree(out)
    return result


def compared(sides: tuple[str, ...], source: Path, out: Path, *, turns: int, cold: bool) -> dict:
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            found[side].append(turn(side, source, out, cold=cold))
            print(
                f"  {side:<13}{found[side][-1]['seconds']:8.2f} s  {found[side][-1]['anon_mib']:8.0f} MiB", flush=True
            )
    return {
        side: {
            "seconds": statistics.median(r["seconds"] for r in results),
            "all_seconds": [round(r["seconds"], 3) for r in results],
            "peak_anon_mib": round(max(r["anon_mib"] for r in results), 1),
        }
        for side, results in found.items()
    }


def beside_cp(folder: Path, turns: int) -> dict:
    results = {}
    for form, name in enumerate(("one tensor an expert", "fused experts")):
        source = folder / f"source-{form}"
        size = make_checkpoint(source, FIELDS | LARGE, form=form)
        for cold in (True, False):
            state = "cold" if cold else "warm"
            print(f"{size / 2**30:.2f} GiB, {name}, {state}")
            found = compared(("zoo", "cp", "cp again"), source, folder / "out", turns=turns, cold=cold)
            first, again = (found[side]["seconds"] / found["zoo"]["seconds"] for side in ("cp", "cp again"))
            print(
                f"  throughput of zoo is {first:.2f} that of cp + sync, {again:.2f} that of a second one after it; "
                f"{size / 1e6 / found['zoo']['seconds']:.0f} MB/s"
            )
            ratios = {"throughput_of_cp": round(first, 3), "throughput_of_cp_again": round(again, 3)}
            results[f"{name}, {state}"] = {"bytes": size, **found, **ratios}
        shutil.rmtree(source)
    return results


def beside_transformers(folder: Path, turns: int) -> dict:
    source = folder / "source"
    size = make_checkpoint(source, FIELDS | SMALL, form=0)
    print(f"{size / 2**30:.2f} GiB, one tensor an expert, warm")
    found = compared(("zoo", "transformers"), source, folder / "out", turns=turns, cold=False)
    shutil.rmtree(source)
    ours, theirs = found["zoo"], found["transformers"]
    ratios = {
        "time_ratio": round(theirs["seconds"] / ours["seconds"], 2),
        "memory_ratio": round(theirs["peak_anon_mib"] / ours["peak_anon_mib"], 2),
    }
    print(f"  transformers takes {ratios['time_ratio']} times as long and {ratios['memory_ratio']} times the memory")
    return {"bytes": size, **found, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to make the checkpoints, on the disk to be measured (30 GB)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        report = {
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "beside_cp": beside_cp(Path(folder), arguments.turns),
            "beside_transformers": beside_transformers(Path(folder), arguments.turns),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
