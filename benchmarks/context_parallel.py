"""Context schemes on two ranks of one core each, beside the same attention in one process with two threads.

fp32, forward and backward of one layer, kernel `sdpa` everywhere. The baseline is a plain ring as public code has it:
contiguous rows, K/V heads repeated before they are sent, lock step, blocks above the diagonal left out. Sides take
turns in one run (A B C A B C ...), so that a busy machine is busy for all; only ratios mean anything. Before any clock
starts, all sides must agree on a short row. `--json FILE` writes every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import socket
import statistics
import sys
import time
from multiprocessing import connection, get_context
from pathlib import Path

LENGTHS = (16_384, 32_768)
SHAPE = (4, 2, 32)
"""Query heads, key/value heads, head size: a step of 32k tokens takes seconds on two cores."""
WINDOW = 2048
CAUSAL = ("ring", "allgather", "ulysses", "hybrid:1", "hybrid:2", "plain ring")
WINDOWED = ("ring", "halo")
BAR = 0.90
SIDES = [("one process", None), *((side, None) for side in CAUSAL), ("one process", WINDOW)]
SIDES += [(side, WINDOW) for side in WINDOWED]


def inputs(length: int, shape: tuple[int, int, int]):
    """q, k, v and dout of a whole row, the same in every process; laid out by tokens, as projections leave them."""
    import torch

    heads, groups, size = shape
    draw = torch.Generator().manual_seed(length)
    sizes = ((heads, length), (groups, length), (groups, length), (heads, length))
    return [torch.randn(1, t, n, size, generator=draw).transpose(1, 2) for n, t in sizes]


def rows_of(layout, rank: int, tensors):
    """A rank's rows of whole rows, laid out as these."""
    return [layout.take(x, rank, 2).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


class OneProcess:
    """The whole row here."""

    def __init__(self, length, shape, window, _side):
        from zoo.core.attention.seam import AttentionSeam
        from zoo.core.sequence.mask import Mask
        from zoo.plugins.attention.sdpa import Sdpa

        self.mask, self.seam = Mask.whole(length, window=window), AttentionSeam(Sdpa())
        self.tensors = inputs(length, shape)

    def __call__(self):
        return seam_step(self.seam, self.tensors, self.mask)


class Scheme:
    """A rank's rows, by one of zoo's context schemes."""

    def __init__(self, length, shape, window, side):
        import torch.distributed as dist

        from zoo.core.attention.seam import AttentionSeam
        from zoo.core.attention.sharded import Exchange, ShardedMask
        from zoo.core.contracts.attention import Link
        from zoo.core.plan.schemes import load_scheme
        from zoo.core.registry.decisions import Registry
        from zoo.core.registry.loading import Plugins
        from zoo.core.sequence.mask import Mask
        from zoo.core.sequence.row_layout import row_layout
        from zoo.plugins.attention.sdpa import Sdpa

        scheme, rank = load_scheme(Registry(Plugins.load()), side), dist.get_rank()
        mask = Mask.whole(length, window=window)
        layout = row_layout(Mask.whole(length), {window: 1}, dist.get_world_size(), splits_rows=scheme.splits_rows)
        self.layout, self.mask = layout, ShardedMask(mask, layout, rank)
        self.seam = AttentionSeam(Sdpa(), Exchange(scheme=scheme, link=Link(dist.group.WORLD)))
        self.tensors = rows_of(layout, rank, inputs(length, shape))

    def __call__(self):
        return seam_step(self.seam, self.tensors, self.mask)


def seam_step(seam, tensors, mask):
    """out, dq, dk, dv and the seconds of forward and of backward."""
    import torch

    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    start = time.perf_counter()
    out = seam(q, k, v, mask)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, (q, k, v), tensors[3])
    return (out.detach(), *grads), (middle - start, time.perf_counter() - middle)


class PlainRing:
    """Ring attention as public code writes it (Liu, Zaharia, Abbeel 2023, without their balance or their fused kernel).

    Rank r owns the r-th part of the row. K/V and, backward, dK/dV of all N heads go round to the next rank; dK/dV take
    as many hops as there are ranks. A message is started before a block is computed and waited for after it.
    """

    def __init__(self, length, shape, _window, _side):
        import torch.distributed as dist

        from zoo.core.sequence.layout import SequenceLayout
        from zoo.plugins.attention.sdpa import Sdpa

        self.rank, self.world, self.kernel = dist.get_rank(), dist.get_world_size(), Sdpa()
        self.layout, self.repeats, self.scale = (
            SequenceLayout.contiguous(length, self.world),
            shape[0] // shape[1],
            shape[2] ** -0.5,
        )
        self.tensors = rows_of(self.layout, self.rank, inputs(length, shape))

    def __call__(self):
        q, k, v, dout = self.tensors
        start = time.perf_counter()
        k, v = (x.repeat_interleave(self.repeats, 1) for x in (k, v))
        out, lse = self.forward(q, k, v)
        middle = time.perf_counter()
        dq, dk, dv = self.backward(dout, q, k, v, out, lse)
        dk, dv = (x.unflatten(1, (-1, self.repeats)).sum(2) for x in (dk, dv))
        return (out, dq, dk, dv), (middle - start, time.perf_counter() - middle)

    def forward(self, q, k, v):
        import torch.nn.functional as f

        out = lse = None
        for step in range(self.world):
            coming, works = self.send_on(k, v) if step + 1 < self.world else ((k, v), [])
            if step <= self.rank:
                more, more_lse = self.kernel.rectangle_forward(q, k, v, causal=step == 0, scale=self.scale)
                if out is None:
                    out, lse = more, more_lse
                else:
                    out = out - (more_lse - lse).sigmoid().unsqueeze(-1) * (out - more)
                    lse = lse - f.logsigmoid(lse - more_lse)
            wait(works)
            k, v = coming
        return out, lse

    def backward(self, dout, q, k, v, out, lse):
        import torch

        dq, sums, sent = torch.zeros_like(q), None, []
        for step in range(self.world):
            coming, works = self.send_on(k, v) if step + 1 < self.world else ((k, v), [])
            parts = None
            if step <= self.rank:
                more, *parts = self.kernel.rectangle_backward(
                    dout, q, k, v, out, lse, causal=step == 0, scale=self.scale
                )
                dq += more
            wait(sent)
            if parts is not None:
                sums = parts if sums is None else [total + part for total, part in zip(sums, parts, strict=True)]
            sums, sent = self.send_on(*sums)
            wait(works)
            k, v = coming
        wait(sent)
        return dq, *sums

    def send_on(self, *tensors):
        import torch
        import torch.distributed as dist

        tensors = [x.contiguous() for x in tensors]
        coming, after, before = [torch.empty_like(x) for x in tensors], self.rank + 1, self.rank - 1
        operations = [dist.P2POp(dist.isend, x, after % self.world) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, before % self.world) for x in coming]
        return coming, [*dist.batch_isend_irecv(operations), Kept(tensors)]


class Kept:
    """Keeps tensors alive until their message is waited for."""

    def __init__(self, tensors):
        self.tensors = tensors

    def wait(self):
        self.tensors = None


def wait(works):
    for work in works:
        work.wait()


def side_of(name):
    return {"one process": OneProcess, "plain ring": PlainRing}.get(name, Scheme)


def serve(pipe, rank: int, world: int, port: int) -> None:
    """Body of a process: computes what it is told, until the pipe closes. Ranks have one thread, the other one two."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(2 if world == 1 else 1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    made: dict[tuple, object] = {}
    while True:
        try:
            length, shape, name, window, whole = pipe.recv()
        except EOFError:
            return
        key = (length, shape, name, window)
        if key not in made:
            made = {kept: side for kept, side in made.items() if kept[0] == length}
            made[key] = side_of(name)(length, shape, window, name)
        if world > 1:
            dist.barrier()
        before = resource.getrusage(resource.RUSAGE_SELF)
        results, seconds = made[key]()
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        pipe.send((made[key].layout if world > 1 and whole else None, results if whole else None, seconds, used))


class Processes:
    """One process with two threads and two ranks with one each; those that are not asked sleep."""

    def __init__(self) -> None:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = get_context("spawn")
        self.pipes = {}
        self.running = []
        for world, rank in ((1, 0), (2, 0), (2, 1)):
            os.environ["OMP_NUM_THREADS"] = "2" if world == 1 else "1"
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.setdefault(world, []).append(ours)
            self.running.append(process)

    def run(self, length, shape, name, window, *, whole: bool = False):
        """Every rank's answer: layout, results if asked for, seconds of each way, seconds of a core."""
        pipes = self.pipes[1 if name == "one process" else 2]
        for pipe in pipes:
            pipe.send((length, shape, name, window, whole))
        for pipe in pipes:
            if not connection.wait([pipe], 600):
                raise SystemExit(f"{name} at {length} tokens was not done in 600 s")
        return [pipe.recv() for pipe in pipes]


def check(processes: Processes, length: int) -> float:
    """The largest difference of any side's out, dq, dk, dv from the one process's, relative to their size."""
    worst = 0.0
    for name, window in SIDES:
        wanted = processes.run(length, SHAPE, "one process", window, whole=True)[0][1]
        answers = processes.run(length, SHAPE, name, window, whole=True)
        layout, parts = answers[0][0], [answer[1] for answer in answers]
        for i, want in enumerate(wanted):
            got = layout.join([part[i] for part in parts], 2) if layout else parts[0][i]
            error = ((got - want).norm() / want.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name} (window {window}) is wrong: result {i} is off by {error:.1e}")
            worst = max(worst, error)
    return worst


def measure(processes: Processes, length: int, turns: int) -> list[dict[str, object]]:
    """Seconds of every side, the slowest rank's, turn by turn."""
    found: dict[tuple[str, int | None], list[tuple[float, float, float, float]]] = {side: [] for side in SIDES}
    for turn in range(turns):
        for name, window in SIDES:
            answers = processes.run(length, SHAPE, name, window)
            ahead, back = (max(answer[2][way] for answer in answers) for way in (0, 1))
            total = max(sum(answer[2]) for answer in answers)
            found[name, window].append((ahead, back, total, sum(answer[3] for answer in answers)))
            print(f"turn {turn + 1}: {name}, window {window}: {total:.2f} s", file=sys.stderr)
    rows = []
    for (name, window), times in found.items():
        one = found["one process", window]
        ratios = [alone[2] / time_[2] for alone, time_ in zip(one, times, strict=True)]
        rows.append(
            {
                "tokens": length,
                "side": name,
                "window": window,
                "forward_s": min(t[0] for t in times),
                "backward_s": min(t[1] for t in times),
                "best_s": min(t[2] for t in times),
                "median_s": statistics.median(t[2] for t in times),
                "throughput": min(t[2] for t in one) / min(t[2] for t in times),
                "throughput_median_of_turns": statistics.median(ratios),
                "core_s": min(t[3] for t in times),
                "core_seconds_ratio": min(t[3] for t in one) / min(t[3] for t in times),
                "turns_s": [t[2] for t in times],
            }
        )
    return rows


def say(rows: list[dict[str, object]]) -> None:
    """One line a side, and whether the bar is met."""
    for row in rows:
        mask = f"window {row['window']}" if row["window"] else "causal"
        print(
            f"{row['tokens']:>6} tokens, {mask:<11}  {row['side']:<12} {row['forward_s']:6.2f} s + "
            f"{row['backward_s']:6.2f} s, {100 * row['throughput']:4.0f} % of one process "
            f"({100 * row['throughput_median_of_turns']:.0f} % in the median turn), "
            f"{row['core_s']:.2f} core seconds ({100 * row['core_seconds_ratio']:.0f} %)"
        )
    causal = {(row["tokens"], row["side"]): row["throughput"] for row in rows if row["window"] is None}
    for length in sorted({tokens for tokens, _ in causal}):
        plain = causal[length, "plain ring"]
        hybrid = max(causal[length, name] for name in CAUSAL if name.startswith("hybrid"))
        met = min(causal[length, "ring"], hybrid) >= BAR
        print(
            f"{length:>6} tokens: ring {causal[length, 'ring'] / plain:.2f}x and hybrid {hybrid / plain:.2f}x the "
            f"plain ring; the bar of {100 * BAR:.0f} % of one process is {'met' if met else 'missed'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--turns", type=int, default=3, help="of the shortest row; longer ones get fewer, 2 at least")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    processes, lengths = Processes(), [int(part) for part in args.lengths.split(",")]
    worst = check(processes, 512)
    check(processes, 1000)
    rows = []
    for length in lengths:
        turns = max(2, math.ceil(args.turns * min(lengths) / length))
        rows += measure(processes, length, turns)
    say(rows)
    if args.json:
        import torch

        facts = {"torch": torch.__version__, "machine": platform.machine(), "heads": SHAPE, "cores": os.cpu_count()}
        load = os.getloadavg()[0]
        args.json.write_text(
            json.dumps({"sides": rows, "largest_difference": worst, "load": load, **facts}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
