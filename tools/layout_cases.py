"""Commands that train the same small model under every kind of layout: what each is, and what must not change.

In fp64, on rows packed of prompts and completions of many lengths, of which only completions are trained.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tools import nas_checkpoint as nas

TIMED = ("tokens_per_s", "tokens_per_s_per_rank", "mfu", "mem_peak_gib", "step_s", "data_s")
"""Of a line of metrics.jsonl, what depends on the machine. All else is a function of job, data and weights."""

_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}
_EXPERTS = {"num_local_experts": 8, "output_router_logits": True, "router_aux_loss_coef": 0.05}
MODELS = {
    "llama": ("llama3", {**_SHAPE, "tie_word_embeddings": False}),
    "llama-tied": ("llama3", {**_SHAPE, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_SHAPE, **_EXPERTS}),
    "nemotron": ("nemotron", _SHAPE),
    "nemotron-nas": ("nemotron-nas", None),
}
"""Family and fields of its config; None where the checkpoint on disk says it all."""

LAYOUTS = [
    # 1 rank
    ("llama", "--set data.micro_batch=4 --memory full"),
    ("mixtral", "--memory full"),
    # 2 and 3 ranks
    ("llama-tied", "--dp-shard 2 --set layout.reshard=false"),
    ("nemotron", "--dp-replicate 2 --set data.micro_batch=2"),
    ("llama-tied", "--dp-shard 2 --data-parallel ddp"),
    ("mixtral", "--dp-replicate 2 --data-parallel zero1"),
    ("mixtral", "--dp-shard 2 --ep 2"),
    ("llama", "--cp 2 --cp-scheme ring"),
    ("nemotron", "--cp 3 --cp-scheme allgather"),
    ("mixtral", "--cp 2 --data-parallel ddp"),
    ("mixtral", "--cp 2 --ep 2 --data-parallel zero1 --memory full"),
    ("llama-tied", "--tp 2"),
    ("nemotron", "--tp 2 --set layout.sequence_parallel=false"),
    ("mixtral", "--tp 2"),
    ("llama-tied", "--pp 2"),
    ("llama", "--pp 2 --pp-schedule gpipe"),
    ("mixtral", "--pp 2 --pp-schedule interleaved"),
    ("nemotron", "--pp 2 --pp-schedule zero-bubble"),
    ("llama-tied", "--pp 2 --pp-schedule zbv"),
    ("nemotron-nas", "--pp 2"),
    # 4 and 6 ranks
    ("llama", "--dp-shard 4"),
    ("mixtral", "--dp-shard 4 --ep 4"),
    ("llama", "--dp-replicate 2 --dp-shard 2"),
    ("mixtral", "--dp-replicate 2 --dp-shard 2 --ep 2 --data-parallel ddp --memory full"),
    ("nemotron", "--dp-replicate 2 --cp 2 --memory full"),
    ("nemotron-nas", "--dp-shard 2 --cp 2 --cp-scheme ulysses --set layout.reshard=false"),
    ("mixtral", "--dp-shard 2 --cp 2 --ep 4 --data-parallel zero1"),
    ("llama-tied", "--cp 4 --cp-scheme hybrid:2 --data-parallel ddp"),
    ("llama", "--cp 2 --tp 2 --cp-scheme ulysses --memory full"),
    ("nemotron", "--cp 3 --tp 2 --memory full"),
    ("mixtral", "--cp 2 --tp 2 --ep 2"),
    ("llama-tied", "--dp-shard 2 --tp 2 --data-parallel zero1"),
    ("llama", "--dp-shard 2 --tp 2 --data-parallel ddp --set layout.sequence_parallel=false"),
    ("nemotron", "--dp-replicate 2 --tp 2 --memory full"),
    ("llama", "--pp 4"),
    ("mixtral", "--pp 2 --cp 2 --ep 2 --pp-schedule interleaved"),
    ("nemotron", "--pp 2 --cp 2 --pp-schedule zbv --memory full"),
    ("llama", "--pp 2 --tp 2"),
    ("llama-tied", "--pp 2 --dp-shard 2 --pp-schedule zero-bubble --pp-virtual 2"),
    ("nemotron", "--pp 2 --dp-shard 2 --data-parallel ddp"),
    ("llama", "--pp 2 --dp-replicate 2 --pp-schedule zbv"),
    # 8 ranks
    ("llama", "--dp-shard 8"),
    ("mixtral", "--dp-shard 4 --cp 2 --ep 8"),
    ("mixtral", "--dp-replicate 2 --dp-shard 2 --cp 2 --ep 2"),
    ("llama-tied", "--dp-replicate 2 --cp 2 --tp 2 --data-parallel zero1"),
    ("mixtral", "--dp-shard 2 --cp 2 --tp 2 --ep 4 --memory full"),
    ("llama-tied", "--pp 2 --cp 2 --tp 2"),
    ("nemotron", "--pp 2 --cp 2 --tp 2 --pp-schedule zbv"),
    ("mixtral", "--pp 2 --dp-shard 2 --cp 2 --ep 4 --pp-schedule zero-bubble"),
    ("mixtral", "--pp 2 --cp 2 --tp 2 --ep 2 --pp-schedule interleaved"),
]
"""A model, and the flags by which a command differs from that of a single process."""


@dataclass(frozen=True)
class Case:
    """One of the layouts."""

    model: str
    flags: str

    def __str__(self) -> str:
        return f"{self.model} {self.flags}"

    @property
    def words(self) -> list[str]:
        return self.flags.split()

    @property
    def world(self) -> int:
        """Ranks."""
        return prod(self._degree(axis) for axis in ("pp", "dp-replicate", "dp-shard", "cp", "tp"))

    @property
    def rows(self) -> int:
        """Rows a step: two microbatches a data-parallel rank, or four where one rank has them all."""
        return max(4, 2 * self.data_parallel)

    @property
    def data_parallel(self) -> int:
        """Ranks that work on different rows."""
        return self._degree("dp-replicate") * self._degree("dp-shard")

    @property
    def layers(self) -> int:
        """Four where a schedule has four stages."""
        return 4 if "--pp" in self.words else 2

    @property
    def job(self) -> tuple[str, int, int]:
        """What a single process must have in common with it: model, layers, rows a step."""
        return self.model, self.layers, self.rows

    def _degree(self, axis: str) -> int:
        words = self.words
        return int(words[words.index(f"--{axis}") + 1]) if f"--{axis}" in words else 1


CASES = [Case(*layout) for layout in LAYOUTS]


class Corpus:
    """Files that the commands need."""

    def __init__(self, folder: Path) -> None:
        self.data, self.nas = folder / "train.jsonl", folder / "nas"
        words = inspect.getsource(textwrap).split()
        samples = [
            {
                "prompt": " ".join(words[i : i + 1 + 13 * i % 40]),
                "completion": " " + " ".join(words[i + 200 : i + 201 + 7 * i % 23]),
            }
            for i in range(0, 400, 5)
        ]
        self.data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        nas.save(self.nas)

    def command(self, model: str, layers: int, rows: int, *, dtype: str = "float64", seq: int = 48) -> list[str]:
        """Arguments of `zoo finetune` but for layout and run directory."""
        family, fields = MODELS[model]
        sets = [] if fields is None else [f"model.{k}={v}" for k, v in {**fields, "num_hidden_layers": layers}.items()]
        # Not to be measured by every run.
        sets.append("log.peak_tflops=1")
        source = ["--from", self.nas] if fields is None else ["--size", "tiny", "--from", "scratch"]
        job = f"--overlong split --dtype {dtype} --seq {seq} --global-batch {rows} --steps 3 --lr 1e-3 --seed 3".split()
        words = [family, *source, "--data", self.data, *job, *(word for s in sets for word in ("--set", s))]
        return [str(word) for word in words]


def untimed(rows: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the machine."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def furthest(found: list[dict], wanted: list[dict]) -> float:
    """The largest difference of two runs' numbers, as a share of the number, or of 1 if that is less."""
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    pairs = [(row[key], other[key]) for row, other in zip(found, wanted, strict=True) for key in row]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
