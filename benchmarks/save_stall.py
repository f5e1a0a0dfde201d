"""What a save costs the steps around it: beside them, or waited for, on two ranks of one core each.

A Llama of 4 layers under FSDP2, fp32, AdamW: two ranks step, and after every few steps comes one of three things by
turns in one run (A B C, C B A, ...), so that a busy machine is busy for all: no save, a save beside the steps
(`checkpoint.async`), a save that is waited for. For each: how long the call held the ranks up (the slower one), as a
share of a step, and how much longer it and the steps until the write had ended took than as many steps without a save,
for a core that writes does not compute. `copy_s` is a plain copy of the same bytes in the same run: what a save beside
the steps cannot do without. Shares of a step are of the clock, and (`cpu`) of a core's time, which a busy machine
changes less; a save that is waited for waits for the disk, which that does not count. Bytes staged are counted where
they are written, and compared with what the rank's parameters and moments take. Only ratios mean anything. `--json
FILE` writes every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

RANKS = 2
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16_000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
KINDS = ("none", "beside", "waited")


def build(seq: int):
    """A rank's TrainState under FSDP2, and its part of a batch of one row a rank."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from zoo.core.contracts.batch import Row
    from zoo.core.contracts.layout import Layout
    from zoo.core.data.collate import collate
    from zoo.core.job.job import OptimSection, ScheduleSection
    from zoo.core.mesh.degrees import Degrees
    from zoo.core.mesh.mesh import Mesh
    from zoo.core.model.load import ModuleSource, load_into
    from zoo.core.run import assemble
    from zoo.core.run.optim import build_optimizer, build_schedule
    from zoo.core.run.step import TrainState
    from zoo.models.llama3.model import SPEC
    from zoo.plugins.attention.sdpa import Sdpa
    from zoo.plugins.memory.policies import KeepAll
    from zoo.plugins.parallel.data_parallel.fsdp import FullyShardedData

    torch.manual_seed(0)
    config = SPEC.parse(CONFIG)
    layout = Layout(seq=seq)
    model = assemble.build(
        SPEC,
        config,
        mesh=Mesh(Degrees(dp_shard=RANKS), "cpu"),
        layout=layout,
        backend=Sdpa(),
        adapters=[FullyShardedData()],
        policy=KeepAll(),
        device=torch.device("cpu"),
    )
    load_into(model, ModuleSource(SPEC.build(config)), ())
    optimizer = build_optimizer(model, OptimSection(lr=1e-4))
    state = TrainState(model, optimizer, build_schedule(ScheduleSection(steps=1000)), lr=1e-4, clip=1.0)
    tokens, labels = np.random.default_rng(dist.get_rank()).integers(0, CONFIG["vocab_size"], (2, seq))
    return state, collate([Row(tokens=tokens, labels=labels, documents=((0, seq),))])


def run(rank: int, folder: str, seq: int, rounds: int, answer) -> None:
    """One rank: its figures to a queue."""
    import torch
    import torch.distributed as dist

    from zoo.core.contracts.parallel import Counts
    from zoo.core.launch.process_group import host_group
    from zoo.core.run.checkpoint import Checkpoints
    from zoo.core.run.saver import Saver
    from zoo.core.run.step import train_step

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)

    class Seen(Checkpoints):
        """Counts the bytes that it is given to write beside the steps."""

        staged = 0

        def write(self, tensors, *rest):
            if threading.current_thread() is not threading.main_thread():
                self.staged = sum(held(value) for value in tensors.values() if isinstance(value, torch.Tensor))
            return super().write(tensors, *rest)

    state, batch = build(seq)
    checkpoints = Seen(Path(folder) / "run", keep=1)
    saver = Saver(checkpoints, host_group())

    def step() -> float:
        start = time.perf_counter()
        train_step(state, [batch], Counts(RANKS * seq, RANKS, RANKS * seq))
        return time.perf_counter() - start

    def save(kind: str) -> tuple[float, float]:
        """Seconds, and those that this thread had a core."""
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.thread_time()
        if kind == "beside":
            saver.start(state, {"step": state.step}, dict)
        elif kind == "waited":
            saver.write(state, {"step": state.step}, dict)
        return time.perf_counter() - start, time.thread_time() - start_cpu

    rows = []
    for kind in ("beside", "waited"):  # once, for what only a first time costs
        step()
        save(kind)
        saver.wait()
    for number in range(rounds):
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            before_cpu = time.process_time()
            plain = step()
            step_cpu_s = time.process_time() - before_cpu
            (held_s, held_cpu_s), steps = save(kind), []
            # Every rank the same number of steps: they go on until all have written.
            while not steps or all_of(saver._flying is not None and not saver._flying[1].done()):
                steps.append(step())
            for saved in saver.wait():
                assert saved.failure is None, saved.failure
            rows.append(
                {
                    "kind": kind,
                    "step_s": plain,
                    "step_cpu_s": step_cpu_s,
                    "held_s": worst(held_s),
                    "held_cpu_s": worst(held_cpu_s),
                    "steps_s": steps,
                    "copy_s": copy(state),
                }
            )
    share = [rank_share(state), checkpoints.staged]
    answer.put((rank, rows, share))
    dist.barrier()


def held(tensor) -> int:
    """Bytes of the memory behind a tensor, or behind this rank's part of it."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().nbytes()


def rank_share(state) -> int:
    """Bytes of a rank's weights, two moments and counts of steps, by their sizes."""
    total = 0
    for parameter in state.model.parameters():
        numbers = parameter.to_local().numel()
        total += 3 * numbers * parameter.element_size() + 4
    return total


def copy(state) -> float:
    """Seconds of a plain copy of a rank's weights, three times, into memory that has been written to before."""
    import torch

    local = [parameter.to_local().detach() for parameter in state.model.parameters()]
    target = [torch.empty_like(tensor).fill_(1) for tensor in local]
    start = time.perf_counter()
    for _ in range(3):
        for a, b in zip(target, local, strict=True):
            a.copy_(b)
    return worst(time.perf_counter() - start)


def worst(seconds: float) -> float:
    """Of all ranks."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def all_of(mine: bool) -> bool:
    """Whether it is so on some rank."""
    return worst(float(mine)) > 0


def summary(rows) -> dict:
    step = statistics.median(row["step_s"] for row in rows)
    step_cpu = statistics.median(row["step_cpu_s"] for row in rows)
    result = {"step_s": step, "step_cpu_s": step_cpu, "copy_s": statistics.median(row["copy_s"] for row in rows)}
    for kind in ("beside", "waited"):
        of = [row for row in rows if row["kind"] == kind]
        held_s = statistics.median(row["held_s"] for row in of)
        longer = [row["held_s"] + sum(row["steps_s"]) - len(row["steps_s"]) * step for row in of]
        result[kind] = {
            "held_s": held_s,
            "held_share_of_step": held_s / step,
            "held_cpu_share_of_step": statistics.median(row["held_cpu_s"] for row in of) / step_cpu,
            "longer_share_of_step": statistics.median(longer) / step,
            "steps_until_written": statistics.median(len(row["steps_s"]) for row in of),
        }
    result["held_beside_over_waited"] = result["beside"]["held_s"] / result["waited"]["held_s"]
    result["held_beside_over_copy"] = result["beside"]["held_s"] / result["copy_s"]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a row; one row a rank and step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="a folder on the disk that is meant")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(dir=words.dir) as folder:
        answer = context.Queue()
        args = (folder, words.tokens, words.rounds, answer)
        ranks = [context.Process(target=run, args=(rank, *args)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        answers = dict((rank, rest) for rank, *rest in (answer.get(timeout=1800) for _ in ranks))
        for process in ranks:
            process.join()
    # A rank's own clock of steps; what held them up is the worst of both already.
    rows = answers[0][0]
    shares = [answers[rank][1] for rank in range(RANKS)]
    report = {
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "config": CONFIG,
        "tokens": words.tokens,
        "rounds": words.rounds,
        "bytes": [{"rank": r, "of_state": state, "staged": staged} for r, (state, staged) in enumerate(shares)],
        **summary(rows),
        "rows": rows,
    }
    shown = {key: value for key, value in report.items() if key not in ("rows", "config")}
    print(json.dumps(shown, indent=2))
    if words.json:
        words.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(state == staged for state, staged in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
