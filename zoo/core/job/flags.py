"""The flags of a job: short names for settings, shared by the command line and the Python functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.core.errors import UsageError, did_you_mean
from zoo.core.job.job import Settings
from zoo.core.job.written import parse_assignments, read_file


@dataclass(frozen=True, slots=True)
class Flag:
    """`--name` stands for the setting `key`."""

    name: str
    key: str
    help: str
    metavar: str = "TEXT"
    switch: bool = False
    """Typed without a value, which is then true."""

    @property
    def keyword(self) -> str:
        """As a Python keyword: `from` is a reserved word there, so it is `from_`."""
        word = self.name.replace("-", "_")
        return word + "_" if word == "from" else word


FLAGS = (
    Flag("size", "model.size", "size of the family, see `zoo models`"),
    Flag("from", "model.from", "checkpoint to start from: hub id, directory, or `scratch`", "ID|DIR"),
    Flag("data", "data.path", "file, directory or glob to train on", "PATH"),
    Flag("seq", "data.seq", "global length of a row in tokens; 64k is 65,536", "TOKENS"),
    Flag("global-batch", "data.global_batch", "rows an optimizer step sees", "ROWS"),
    Flag("data-format", "data.format", "text, messages or completion; detected if not given"),
    Flag("overlong", "data.overlong", "samples longer than a row: error, split, truncate or drop"),
    Flag("loss-on", "data.loss_on", "what is trained in a conversation: assistant, last, completion or all"),
    Flag("chat-template", "data.chat_template", "jinja file to use instead of the tokenizer's own template", "FILE"),
    Flag("layout", "layout.degrees", "auto: choose the degrees that are not given, and say why", "auto"),
    Flag("nproc", "launch.nproc", "ranks to start on this machine; its accelerators if not given", "N"),
    Flag("cp", "layout.cp", "context-parallel degree: ranks that share a row", "N"),
    Flag("tp", "layout.tp", "tensor-parallel degree", "N"),
    Flag("pp", "layout.pp", "pipeline-parallel degree", "N"),
    Flag("pp-schedule", "layout.pp_schedule", "1f1b, gpipe, interleaved, zero-bubble or zbv"),
    Flag("pp-virtual", "layout.pp_virtual", "stages a pipeline rank; as few as the schedule needs", "N"),
    Flag("ep", "layout.ep", "expert-parallel degree", "N"),
    Flag("dp-shard", "layout.dp_shard", "data-parallel degree that shards the weights; fills the machine", "N"),
    Flag("dp-replicate", "layout.dp_replicate", "data-parallel degree that replicates them", "N"),
    Flag("data-parallel", "layout.data_parallel", "how weights live over data-parallel ranks: fsdp, zero1 or ddp"),
    Flag("cp-scheme", "layout.cp_scheme", "how K/V travel: auto, a scheme, or ring,halo: without and with a window"),
    Flag("attn", "attention.backend", "attention kernel: auto or a backend's name"),
    Flag("memory", "memory.policy", "what is kept for backward: auto, none, full"),
    Flag("steps", "schedule.steps", "optimizer steps", "N"),
    Flag("lr", "optim.lr", "peak learning rate", "RATE"),
    Flag("dtype", "model.dtype", "arithmetic: float32, bfloat16 or float64"),
    Flag("deterministic", "model.deterministic", "the same run twice gives the same bits; slower", switch=True),
    Flag("seed", "data.seed", "seed of data order and random weights", "N"),
    Flag("save-every", "checkpoint.every", "steps between checkpoints", "N"),
    Flag("keep", "checkpoint.keep", "finished checkpoints to keep", "N"),
    Flag("out", "checkpoint.out", "run directory; named after the job if not given", "DIR"),
    Flag("resume", "checkpoint.resume", "auto, never, or a run or checkpoint to go on from"),
    Flag("max-restarts", "launch.max_restarts", "times that ranks are started again after one died or hung", "N"),
    Flag("log-every", "log.every", "steps between progress lines", "N"),
    Flag("track", "log.track", "metrics sinks beside metrics.jsonl, separated by commas", "NAMES"),
)


NEEDS = {
    "cp_scheme": ("cp", "how K/V travel between ranks that share a row"),
    "cp_balance": ("cp", "how rows are cut"),
    "cp_wire": ("cp", "in which type K/V travel between ranks that share a row"),
    "pp_schedule": ("pp", "the order of a pipeline's microbatches"),
    "pp_virtual": ("pp", "the stages of a pipeline's ranks"),
    "sequence_parallel": ("tp", "whether tensor-parallel ranks cut a row's tokens"),
    "overlap_tensor": ("tp", "whether products of tensor-parallel ranks overlap their messages"),
}
"""Settings that mean nothing where an axis has one rank, and what they say."""
_DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


def from_flags(model: str | None, flags: Mapping[str, Any]) -> tuple[Settings, Settings, Settings]:
    """The layers a command line gives, weakest first: file (`c`), assignments (`set`), flags. Raises UsageError."""
    known = {flag.keyword: flag for flag in FLAGS}
    for keyword in flags:
        if keyword not in (*known, "c", "set"):
            raise UsageError(f"unknown keyword '{keyword}'. {did_you_mean(keyword, known)}".rstrip())
    file = read_file(Path(flags["c"])) if flags.get("c") else {}
    assigned = parse_assignments(tuple(flags.get("set") or ()))
    said: Settings = {
        flag.key: (value, f"--{flag.name}")
        for keyword, flag in known.items()
        if (value := flags.get(keyword)) is not None
    }
    if model is not None:
        said = {**said, "model.name": (model, "MODEL")}
    return _without_outdated(file, {**assigned, **said}), assigned, said


def _without_outdated(file: Settings, later: Settings) -> Settings:
    """A file without what it resolved for a layout that is no longer meant: a run's config.yaml says everything."""
    value = {key: str(said[0]) for key, said in later.items()}
    outdated = {f"layout.{name}" for name, (axis, _) in NEEDS.items() if value.get(f"layout.{axis}") == "1"}
    if value.get("layout.degrees") == "auto":
        outdated |= {f"layout.{axis}" for axis in _DEGREES}
    return {key: said for key, said in file.items() if key not in outdated}
