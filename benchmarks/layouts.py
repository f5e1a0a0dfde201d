"""Every layout beside one process: bytes by collective and group against their formula, and the time of a step.

Real gloo ranks on this machine, fp32, jobs as `zoo finetune` prepares them, random weights, packed rows; 4 blocks of
width 128, rows of 512 tokens, 8 a step. Bytes are counted on every rank and must be those of the account
(docs/layout-traffic.md). A step of the layout and one of a single process that does the same work run by turns; the
single process has CORES threads, N ranks have CORES / N each, at least one. Ranks share the cores, so nothing can be
won: `kept` = single / layout is 1 if cutting, messages and waiting cost nothing. Only these ratios mean anything.
`--json FILE` writes every figure, `--only TEXT` takes the layouts that have it in their name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # also in the ranks, which import this file again
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # a thread that waits must leave its core to ranks

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from zoo.core.contracts.account import Microbatch  # noqa: E402
from zoo.core.contracts.batch import IGNORE, Row  # noqa: E402
from zoo.core.contracts.parallel import Counts  # noqa: E402
from zoo.core.data.collate import collate  # noqa: E402
from zoo.core.job.flags import from_flags  # noqa: E402
from zoo.core.mesh.mesh import Mesh  # noqa: E402
from zoo.core.model.load import ModuleSource, load_into  # noqa: E402
from zoo.core.plan.prepare import prepare, with_recipe  # noqa: E402
from zoo.core.plan.traffic import sent, step_traffic  # noqa: E402
from zoo.core.registry.decisions import Registry  # noqa: E402
from zoo.core.registry.loading import Plugins  # noqa: E402
from zoo.core.run import assemble  # noqa: E402
from zoo.core.run.optim import build_optimizer, build_schedule  # noqa: E402
from zoo.core.run.step import TrainState, train_step  # noqa: E402
from zoo.testing import ranks  # noqa: E402
from zoo.testing.traffic import CollectiveCounter, Routed, compared  # noqa: E402

CORES, SEQ, ROWS = 2, 512, 8
SHAPE = ("model.num_hidden_layers=4", "model.num_attention_heads=8", "model.num_key_value_heads=4")
LAYOUTS = [
    ("llama3", {"dp_shard": 2}),
    ("llama3", {"dp_shard": 2, "set": ("layout.reshard=false",)}),
    ("llama3", {"dp_shard": 2, "data_parallel": "zero1"}),
    ("llama3", {"dp_shard": 2, "data_parallel": "ddp"}),
    ("llama3", {"dp_shard": 2, "memory": "full"}),
    ("nemotron", {"tp": 2}),
    ("llama3", {"tp": 2, "set": ("layout.sequence_parallel=false",)}),
    ("llama3", {"cp": 2, "cp_scheme": "ring"}),
    ("llama3", {"cp": 2, "cp_scheme": "ulysses"}),
    ("llama3", {"pp": 2}),
    ("llama3", {"pp": 2, "pp_schedule": "interleaved"}),
    ("mixtral", {"pp": 2, "pp_schedule": "zbv"}),
    ("mixtral", {"dp_shard": 2, "ep": 2}),
    ("llama3", {"dp_replicate": 2, "dp_shard": 2}),
    ("llama3", {"dp_shard": 4, "data_parallel": "zero1"}),
    ("nemotron", {"dp_shard": 2, "tp": 2}),
    ("llama3", {"dp_shard": 2, "cp": 2, "cp_scheme": "allgather"}),
    ("llama3", {"pp": 2, "dp_shard": 2, "data_parallel": "zero1"}),
    ("nemotron", {"pp": 2, "tp": 2, "pp_schedule": "zero-bubble"}),
    ("mixtral", {"cp": 2, "tp": 2, "ep": 2}),
    ("llama3", {"pp": 2, "cp": 2, "tp": 2}),
    ("mixtral", {"pp": 2, "cp": 2, "dp_shard": 2, "ep": 2}),
    ("mixtral", {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 4, "data_parallel": "ddp"}),
    ("llama3", {"pp": 4, "dp_shard": 2}),
]


def prepared_for(model: str, flags: dict[str, object]):
    registry = Registry(Plugins.load(only=[]))
    common = {
        "data": str(ROOT / "README.md"),
        "seq": str(SEQ),
        "global_batch": ROWS,
        "from_": "scratch",
        "size": "tiny",
        "dtype": "float32",
        "memory": "none",
    }
    settings = (*SHAPE, *flags.get("set", ()))
    chosen = common | flags | {"set": settings}
    return prepare(with_recipe(registry, *from_flags(model, chosen)), registry)


def rows_of(vocab_size: int) -> list[Row]:
    """Packed documents of all lengths, most tokens trained."""
    draw = np.random.default_rng(0)
    result = []
    for _ in range(ROWS):
        cuts = sorted({0, SEQ, *draw.integers(1, SEQ, 3).tolist()})
        tokens, labels = draw.integers(0, vocab_size, (2, SEQ))
        labels[draw.random(SEQ) < 0.1] = IGNORE
        result.append(Row(tokens=tokens, labels=labels, documents=tuple(pairwise(cuts))))
    return result


class Side:
    """One way to do a step, on this rank."""

    def __init__(self, model: str, flags: dict[str, object]) -> None:
        self.prepared = prepared = prepared_for(model, flags)
        self.mesh = Mesh(prepared.layout.degrees, "cpu") if prepared.adapters else None
        spec, config, degrees = prepared.spec, prepared.config, prepared.layout.degrees
        self.model = assemble.build(
            spec,
            config,
            mesh=self.mesh,
            layout=prepared.layout,
            backend=prepared.backend,
            adapters=prepared.adapters,
            policy=prepared.policy,
            device=torch.device("cpu"),
        )
        torch.manual_seed(0)
        whole = spec.build(config)
        load_into(self.model, ModuleSource(whole), (), whole_model=whole)
        job = prepared.job
        self.state = TrainState(
            model=self.model,
            optimizer=build_optimizer(self.model, job.optim),
            schedule=build_schedule(job.schedule),
            lr=job.optim.lr,
            clip=job.optim.clip,
            forward_backward=assemble.forward_backward(
                self.model, spec.plan(config), mesh=self.mesh, layout=prepared.layout, adapters=prepared.adapters
            ),
        )
        every, each = rows_of(config.vocab_size), ROWS // degrees.dp
        self.trained = sum(row.trained_tokens for row in every)
        place = [self.mesh.rank(axis) for axis in ("dp_replicate", "dp_shard")] if self.mesh else [0, 0]
        first = (place[0] * degrees.dp_shard + place[1]) * each
        self.whole_batches = [collate([row]) for row in every[first : first + each]]
        self.batches = [self._cut(batch) for batch in self.whole_batches]

    def _cut(self, batch):
        for adapter in self.prepared.adapters:
            batch = adapter.shard_batch(batch, self.mesh, self.prepared.layout)
        return batch

    def step(self) -> None:
        train_step(self.state, self.batches, Counts(self.trained, ROWS, self.trained))

    def count(self) -> dict[str, object]:
        """One step, counted: rows of the table and whether all is as the account says."""
        prepared = self.prepared
        plan, ep = prepared.spec.plan(prepared.config), prepared.layout.degrees.ep
        routed = Routed(self.model, plan, self.mesh["ep"].get_group()) if ep > 1 else None
        with CollectiveCounter() as wire:
            self.step()
        copies = routed.copies() if routed else []
        calls = len(copies) // len(self.batches)
        account = step_traffic(
            prepared.spec,
            prepared.config,
            layout=prepared.layout,
            adapters=prepared.adapters,
            policy=prepared.policy,
            batches=[
                Microbatch(
                    mask=whole.mask,
                    tokens=batch.tokens.shape[1],
                    trained=int((batch.labels != IGNORE).sum()),
                    copies=copies[i * calls : (i + 1) * calls] if routed else None,
                )
                for i, (whole, batch) in enumerate(zip(self.whole_batches, self.batches, strict=True))
            ],
            rank=dist.get_rank(),
        )
        return [
            {
                "collective": kind,
                "group": ", ".join(axes),
                "ranks": len(group),
                "messages": found.messages,
                "counted": found.payload,
                "formula": said.payload,
                "sent": sent(kind, len(group), found.payload),
            }
            for (kind, group), (axes, found, said) in compared(wire, account).items()
        ]


def race(model: str, flags: dict[str, object], turns: int):
    """On a rank: bytes of a step, and seconds of the single process's steps and the layout's, those by the slowest."""
    warnings.simplefilter("ignore")
    side, alone = (
        Side(model, flags),
        Side(model, {"memory": flags.get("memory", "none")}) if dist.get_rank() == 0 else None,
    )
    side.step()
    counted, times = side.count(), {"single": [], "layout": []}
    for turn in range(turns + 1):
        dist.barrier()
        torch.set_num_threads(CORES)
        start = time.perf_counter()
        if alone is not None:
            alone.step()
        middle = time.perf_counter()
        dist.barrier()
        torch.set_num_threads(max(1, CORES // dist.get_world_size()))
        again = time.perf_counter()
        side.step()
        dist.barrier()
        if turn:
            times["single"].append(middle - start)
            times["layout"].append(time.perf_counter() - again)
    torch.set_num_threads(1)
    return counted, times


def name_of(model: str, flags: dict[str, object]) -> str:
    words = [f"{key.replace('_', '-')} {value}" for key, value in flags.items() if key != "set"]
    return ", ".join([model, *words, *(text.removeprefix("layout.") for text in flags.get("set", ()))])


def compare(model: str, flags: dict[str, object], turns: int) -> dict[str, object]:
    degrees = prepared_for(model, flags).layout.degrees
    parts = ranks.run(degrees.world_size, race, model, flags, turns, timeout=300.0)
    times = parts[0][1]
    single, layout = statistics.median(times["single"]), statistics.median(times["layout"])
    return {
        "layout": name_of(model, flags),
        "ranks": degrees.world_size,
        "as_accounted": all(row["counted"] == row["formula"] for counted, _ in parts for row in counted),
        "first_rank": parts[0][0],
        "sent_by_all_ranks": sum(row["sent"] for counted, _ in parts for row in counted),
        "single_s": single,
        "layout_s": layout,
        "kept": single / layout,
        "seconds": times,
    }


def show(result: dict[str, object]) -> None:
    same = "as accounted" if result["as_accounted"] else "NOT AS ACCOUNTED"
    print(
        f"{result['layout']}: {result['ranks']} ranks, {result['sent_by_all_ranks'] / 1e6:.2f} MB sent a step, {same}; "
        f"step {result['layout_s']:.3f} s beside {result['single_s']:.3f} s alone, kept {result['kept']:.2f}"
    )
    for row in result["first_rank"]:
        print(
            f"    {row['collective']:<15}{row['group']:<14}{row['messages']:>6} messages {row['counted']:>12,} bytes, "
            f"formula {row['formula']:>12,}, sent {row['sent']:>14,.0f}"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for model, flags in LAYOUTS:
        if args.only in name_of(model, flags):
            results.append(compare(model, flags, args.turns))
            show(results[-1])
    if args.json:
        versions = {"torch": torch.__version__, "machine": platform.machine(), "cores": CORES}
        args.json.write_text(json.dumps({"layouts": results, "versions": versions}, indent=2) + "\n")
    if not all(result["as_accounted"] for result in results):
        sys.exit("some layout sends something else than its account says")


if __name__ == "__main__":
    main()
