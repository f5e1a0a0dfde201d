"""What a rank's slices cost a kernel, beside one call for the whole row: every rank of a simulated `--cp 8`.

Llama-3-8B's heads (32 over 8, size 128), bfloat16, one causal document, head-tail. For every kernel that runs here it
times one forward and one backward over the whole row, then each step of each rank's ring plan by itself, and prints
their sum over the whole row's time, TFLOP/s, and the share of the accelerator's peak.

    python benchmarks/attention_kernels.py --seq 64k --seq 256k --json benchmarks/results/attention_kernels.json

On a CPU it runs in float32 and needs a shorter row (`--seq 4k`), which shows the logic and little else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.core.attention.slices import Slices, local_slices
from zoo.core.contracts.attention import AttentionBackend, AttentionProblem, HeadShape
from zoo.core.humanize import format_tokens, parse_tokens
from zoo.core.machine.device import accelerator_type, peak_tflops
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask
from zoo.plugins.context.ring import Ring

HEADS = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
KERNELS = ("flash", "cudnn", "sdpa", "flex")
FORWARD, BACKWARD = 4, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", action="append", help="length of a row, as 64k; may be given more than once")
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = accelerator_type() or "cpu"
    dtype = "bfloat16" if device != "cpu" else "float32"
    registry = Registry(Plugins.load())
    peak = peak_tflops(dtype, 1)
    rows = []
    for length in map(parse_tokens, options.seq or ["64k", "256k"]):
        for name in KERNELS:
            backend: AttentionBackend = registry.attention.load(name)()
            reason = backend.supports(AttentionProblem(device=device, dtype=dtype, **_shape()))
            if reason is not None:
                print(f"{format_tokens(length):>6} {name:<6} {reason}")
                continue
            row = compare(backend, length, options.cp, options.repeat, getattr(torch, dtype), device)
            row |= {"kernel": name, "seq": length, "cp": options.cp, "dtype": dtype}
            rows.append(row | {"share_of_peak": row["tflops"] / peak if peak else None})
            print(
                f"{format_tokens(length):>6} {name:<6} slices/whole {row['forward_ratio']:.3f} forward, "
                f"{row['backward_ratio']:.3f} backward, {row['ratio']:.3f} both; {row['tflops']:.0f} TFLOP/s"
                + (f", {100 * row['tflops'] / peak:.0f} % of peak" if peak else "")
            )
    if options.json:
        machine = {"device": _device_name(device), "torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def compare(
    backend: AttentionBackend, length: int, degree: int, repeat: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Seconds of the whole row and of all ranks' steps, their ratios, and the slices' TFLOP/s."""
    mask = Mask.whole(length)
    whole = _timed(backend, length, length, local_slices(mask, ((0, length),)), repeat, dtype, device)
    layout, total = SequenceLayout.head_tail(length, degree), [0.0, 0.0]
    for rank in range(degree):
        plan = Ring().plan(mask, layout, rank, HEADS)
        rows = layout.local_length(rank)
        steps = [(rows, rows, plan.own)]
        steps += [(s.queries[1] - s.queries[0], s.keys[1] - s.keys[0], s.slices) for s in plan.forward.steps]
        for queries, keys, slices in steps:
            if slices:
                for way, seconds in enumerate(_timed(backend, queries, keys, slices, repeat, dtype, device)):
                    total[way] += seconds
    work = (FORWARD + BACKWARD) * mask.area * HEADS.num_heads * HEADS.head_dim
    return {
        "whole_forward_s": whole[0],
        "whole_backward_s": whole[1],
        "slices_forward_s": total[0],
        "slices_backward_s": total[1],
        "forward_ratio": total[0] / whole[0],
        "backward_ratio": total[1] / whole[1],
        "ratio": sum(total) / sum(whole),
        "tflops": work / sum(total) / 1e12,
        "whole_tflops": work / sum(whole) / 1e12,
    }


def _timed(
    backend: AttentionBackend, queries: int, keys: int, slices: Slices, repeat: int, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Median seconds of forward and of backward, laid out by tokens as projections leave them."""
    q, dout = (_random(queries, HEADS.num_heads, dtype, device) for _ in range(2))
    k, v = (_random(keys, HEADS.num_kv_heads, dtype, device) for _ in range(2))
    scale = HEADS.head_dim**-0.5
    out, lse = backend.forward(q, k, v, slices, scale)
    out = out.to(dtype)
    ahead = _median(lambda: backend.forward(q, k, v, slices, scale), repeat, device)
    back = _median(lambda: backend.backward(dout, q, k, v, out, lse, slices, scale), repeat, device)
    return ahead, back


def _median(call: Callable[[], object], repeat: int, device: str) -> float:
    call()
    times = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _random(rows: int, heads: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(1, rows, heads, HEADS.head_dim, dtype=dtype, device=device).transpose(1, 2)


def _shape() -> dict[str, int]:
    return {"head_dim": HEADS.head_dim, "num_heads": HEADS.num_heads, "num_kv_heads": HEADS.num_kv_heads}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
