"""A training step beside transformers' LlamaForCausalLM, and `--cp 2` beside one process.

Same weights, same tokens, fp32, two threads, AdamW; 4 layers, hidden 256, 4/2 heads, vocabulary 32,000. Each side runs
in processes of its own, by turns, so that peak memory is its own and a busy machine is busy for both. Only ratios mean
anything. `--json FILE` writes every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
LR = 1e-4


def make_checkpoint(folder: Path) -> None:
    """Random weights as transformers saves them, and the embedded tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import zoo.models.llama3

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(zoo.models.llama3.__file__).parent / "tiny" / name, folder)


def tokens_of(count: int):
    import torch

    return torch.randint(0, CONFIG["vocab_size"], (1, count + 1), generator=torch.Generator().manual_seed(0))


def step_of_transformers(folder: Path, count: int):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    row = tokens_of(count)
    # transformers shifts labels itself: the row and its labels are the same tokens.
    tokens = row[:, :-1].contiguous()

    def loss():
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return model, loss


def step_of_zoo(folder: Path, count: int):
    import zoo
    from zoo.core.attention.seam import AttentionSeam
    from zoo.core.model.seams import replace_modules
    from zoo.plugins.attention.sdpa import Sdpa

    model = zoo.load(folder).train()
    replace_modules(model, "model.layers.*.self_attn.core", lambda _old: AttentionSeam(Sdpa()), owner="benchmark")
    row = tokens_of(count)
    tokens, labels = row[:, :-1].contiguous(), row[:, 1:].contiguous()
    labels[:, -1] = -100  # transformers has no target there

    def loss():
        return model(tokens, labels=labels) / (count - 1)

    return model, loss


def measure(side: str, folder: Path, count: int, steps: int) -> dict[str, float]:
    """In a process of its own: tokens/s of the median step, peak memory above what imports and weights took."""
    import torch

    torch.set_num_threads(2)
    model, loss = {"transformers": step_of_transformers, "zoo": step_of_zoo}[side](folder, count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, first = [], 0.0
    for step in range(steps + 1):
        start = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        first = first if step else value.item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": first,
        "tokens_per_s": count / statistics.median(times[1:]),
        "peak_gib": peak / 2**20,
        "step_gib": (peak - before) / 2**20,
    }


def run_side(side: str, folder: Path, count: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--tokens", str(count)]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_zoo(folder: Path, count: int, cp: int, out: Path, steps: int) -> float:
    """tokens/s of the median step of a real run, first step left out; two threads in all."""
    command = [
        sys.executable,
        "-m",
        "zoo",
        "finetune",
        "llama3",
        "--from",
        str(folder),
        "--data",
        str(folder / "d.txt"),
    ]
    command += [
        "--seq",
        str(count),
        "--cp",
        str(cp),
        "--steps",
        str(steps + 1),
        "--save-every",
        "1000",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(2 // cp)})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tokens_per_s"] for row in rows[1:])


def compare(folder: Path, counts: list[int], steps: int, turns: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for count in counts:
        sides: dict[str, list[dict[str, float]]] = {"zoo": [], "transformers": []}
        for _ in range(turns):
            for side, found in sides.items():
                found.append(run_side(side, folder, count, steps))
        best = {side: max(found, key=lambda f: f["tokens_per_s"]) for side, found in sides.items()}
        rows.append(
            {
                "tokens": count,
                **{f"{side}_{key}": value for side, found in best.items() for key, value in found.items()},
                "speed_ratio": best["zoo"]["tokens_per_s"] / best["transformers"]["tokens_per_s"],
                "memory_ratio": best["zoo"]["peak_gib"] / best["transformers"]["peak_gib"],
                "loss_difference": abs(best["zoo"]["loss"] - best["transformers"]["loss"]),
            }
        )
    return rows


def compare_context_parallel(folder: Path, count: int, steps: int, turns: int) -> dict[str, object]:
    """One document as long as the row, so that every rank needs the others' keys."""
    (folder / "d.txt").write_text("import os\n" * (count * 2))
    speed: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for cp, found in speed.items():
            with tempfile.TemporaryDirectory() as out:
                found.append(run_zoo(folder, count, cp, Path(out) / f"run-{turn}", steps))
    best = {cp: max(found) for cp, found in speed.items()}
    return {"tokens": count, "cp1_tokens_per_s": best[1], "cp2_tokens_per_s": best[2], "kept": best[2] / best[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["zoo", "transformers"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.folder, args.tokens, args.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        steps = compare(folder, [4096, 16_384], args.steps, args.turns)
        parallel = compare_context_parallel(folder, 16_384, args.steps, args.turns)
    for row in steps:
        ours, theirs = row["zoo_tokens_per_s"], row["transformers_tokens_per_s"]
        print(
            f"{row['tokens']:>6} tokens: {ours:,.0f} tok/s beside {theirs:,.0f} = {row['speed_ratio']:.2f}x; "
            f"peak {row['zoo_peak_gib']:.2f} GiB beside {row['transformers_peak_gib']:.2f} = "
            f"{row['memory_ratio']:.2f}x; losses differ by {row['loss_difference']:.1e}"
        )
    print(f"--cp 2 keeps {100 * parallel['kept']:.0f} % of one process's tokens/s at {parallel['tokens']} tokens")
    if args.json:
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
        args.json.write_text(json.dumps({"steps": steps, "cp": parallel, "versions": versions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
