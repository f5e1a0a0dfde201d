"""Attention under each context scheme, timed on real ranks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.core.attention.forecast import BACKWARD_FLOPS, FORWARD_FLOPS
from zoo.core.attention.seam import AttentionSeam
from zoo.core.attention.sharded import Exchange, ShardedMask
from zoo.core.bench.figures import layout_for
from zoo.core.contracts.attention import AttentionBackend, HeadShape, Link
from zoo.core.launch.launcher import Work, launch
from zoo.core.launch.process_group import process_group
from zoo.core.launch.rank_folder import RankFolder
from zoo.core.launch.watchdog import Heartbeat
from zoo.core.machine.device import accelerator_type, attention_flops, memory_bytes
from zoo.core.machine.launcher_env import own_rank
from zoo.core.mesh.degrees import Degrees
from zoo.core.mesh.mesh import Mesh
from zoo.core.plan.schemes import load_scheme
from zoo.core.registry.decisions import Registry
from zoo.core.registry.failures import plugins_named
from zoo.core.registry.loading import Plugins
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

PATIENCE = 4.0
"""Seconds that one forward and backward may be expected to take; longer rows are measured shorter."""
SHORTEST = 1024
MEASURING = Work(
    target="zoo.core.bench.measure:measure_as_asked",
    on_signal="stopping the ranks",
    again="Nothing was written; without --measure the figures come from the plans alone",
)

Step = Callable[[], tuple[float, float]]
"""One forward and backward: the seconds of each on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is measured."""

    mask: Mask
    heads: HeadShape
    schemes: tuple[str, ...]
    """As `--cp-scheme` takes them."""
    backend: str
    dtype: str
    balance: str = "auto"
    repeats: int = 5

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Trial:
        """The inverse of `dataclasses.asdict`, through JSON."""
        mask = dict(plain["mask"])
        documents, prefixes = tuple(map(tuple, mask.pop("documents"))), tuple(mask.pop("prefixes"))
        return cls(
            **{
                **plain,
                "mask": Mask(documents=documents, prefixes=prefixes, **mask),
                "heads": HeadShape(**plain["heads"]),
                "schemes": tuple(plain["schemes"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one layer, those of the slowest rank: medians over the repeats, and all of them."""

    forward: float
    backward: float
    total: float
    totals: tuple[float, ...]


def measure(trial: Trial, plugins: Plugins, num_ranks: int) -> dict[str, Timing]:
    """Time every scheme on `num_ranks` ranks of this machine, by turns, after one turn that does not count.

    Raises what `launch` raises.
    """
    found = launch({"trial": asdict(trial), "plugins": plugins.resolved()}, num_ranks, MEASURING)
    return {name: Timing(**{**timing, "totals": tuple(timing["totals"])}) for name, timing in found.items()}


def affordable_length(mask_of: Callable[[int], Mask], length: int, heads: HeadShape, dtype: str, ranks: int) -> int:
    """The longest of `length`, a half of it, a quarter, ... whose forward and backward is fast and fits this machine.

    `mask_of` gives the mask of a length. Seconds are those of data sheets; 1024 tokens are always affordable.
    """
    speed = attention_flops(dtype, ranks) * ranks
    value = torch.finfo(getattr(torch, dtype)).bits // 8
    # q, k, v, out, dout in their own type, and twice that in fp32 for sums and for what travels.
    row = heads.head_dim * (3 * heads.num_heads + 2 * heads.num_kv_heads) * (value + 8)
    room = memory_bytes() * (ranks if accelerator_type() else 1) // 2
    while length // 2 >= SHORTEST:
        flops = (FORWARD_FLOPS + BACKWARD_FLOPS) * heads.head_dim * heads.num_heads * mask_of(length).area
        if flops <= PATIENCE * speed and row * length <= room:
            break
        length //= 2
    return length


def time_schemes(trial: Trial, registry: Registry) -> dict[str, Timing]:
    """Every scheme's times on the ranks of the default group. Collective; all ranks return the same."""
    with process_group() as device:
        mesh = Mesh(Degrees(cp=dist.get_world_size()), device.type)
        link = Link(mesh["cp"].get_group())
        backend: AttentionBackend = registry.attention.make(trial.backend)
        steps = {name: _step(name, trial, registry, backend, link, device) for name in trial.schemes}
        found: dict[str, list[list[float]]] = {name: [] for name in steps}
        for turn in range(trial.repeats + 1):
            for name, step in steps.items():
                dist.barrier()
                times = torch.tensor([*(seconds := step()), sum(seconds)], dtype=torch.float64)
                dist.all_reduce(times, op=dist.ReduceOp.MAX)
                if turn:
                    found[name].append(times.tolist())
        return {name: _timing(times) for name, times in found.items()}


def _timing(times: Sequence[Sequence[float]]) -> Timing:
    forward, backward, totals = zip(*times, strict=True)
    middle = statistics.median
    return Timing(forward=middle(forward), backward=middle(backward), total=middle(totals), totals=totals)


def _step(
    name: str, trial: Trial, registry: Registry, backend: AttentionBackend, link: Link, device: torch.device
) -> Step:
    scheme, rank, degree = load_scheme(registry, name), dist.get_rank(link.group), dist.get_world_size(link.group)
    layout = layout_for(scheme, trial.mask, degree, balance=trial.balance)
    seam, mask = AttentionSeam(backend, Exchange(scheme=scheme, link=link)), ShardedMask(trial.mask, layout, rank)
    q, k, v, dout = _rows(trial, layout, rank, device)
    # A group of NCCL connects in its first call, in which all ranks must take part.
    dist.all_reduce(torch.zeros(1, device=device), group=link.group)

    def step() -> tuple[float, float]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        start = _now(device)
        out = seam(*leaves, mask)
        middle = _now(device)
        torch.autograd.grad(out, leaves, dout)
        return middle - start, _now(device) - middle

    return step


def _rows(trial: Trial, layout: SequenceLayout, rank: int, device: torch.device) -> list[Tensor]:
    """This rank's q, k, v and dout. Their values do not matter to the clock."""
    heads, tokens = trial.heads, layout.local_length(rank)
    draw = torch.Generator(device).manual_seed(rank)
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    dtype = getattr(torch, trial.dtype)
    return [torch.randn(1, n, tokens, heads.head_dim, generator=draw, device=device, dtype=dtype) for n in counts]


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure_as_asked(payload: dict[str, Any], rank_folder: RankFolder, heartbeat: Heartbeat) -> None:
    """Time schemes as one rank of a launcher; rank 0 leaves the answer."""
    heartbeat.enters("measuring")
    trial, plugins = Trial.from_plain(payload["trial"]), Plugins.from_resolved(payload["plugins"])
    with plugins_named(plugins):
        found = time_schemes(trial, Registry(plugins))
    if own_rank() == 0:
        rank_folder.answer.write_text(json.dumps({name: asdict(timing) for name, timing in found.items()}))
