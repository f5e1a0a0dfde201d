"""What ranks really hand to their collectives is what the account of the layout says, message by message.

What the first rank of each layout was counted to send is a table in the docs.
`ZOO_WRITE_DOCS=1 pytest tests/distributed/test_traffic.py` writes it into docs/layout-traffic.md; without that the test
compares.
"""

from __future__ import annotations

import os
import socket
import struct
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.harness import layouts
from zoo.core.contracts.account import Microbatch
from zoo.core.contracts.batch import IGNORE
from zoo.core.contracts.parallel import Counts
from zoo.core.data.collate import collate
from zoo.core.launch.process_group import any_rank
from zoo.core.mesh.degrees import Degrees
from zoo.core.mesh.mesh import Mesh
from zoo.core.plan.traffic import sent, step_traffic
from zoo.core.run.feed import Feed
from zoo.core.run.metrics import Meter, Pending
from zoo.core.run.step import StepResult, train_step
from zoo.testing import ranks
from zoo.testing.traffic import CollectiveCounter, Routed, compared

pytestmark = pytest.mark.dist

PAGE = Path(__file__).parents[2] / "docs" / "layout-traffic.md"
TCP_BYTES_SENT = 200
"""Where Linux has tcpi_bytes_sent in struct tcp_info."""
BEGIN, END = "<!-- bytes: written by tests/distributed/test_traffic.py -->", "<!-- end of bytes -->"
LAYOUTS = [
    ("llama", "dp_shard2"),
    ("llama", "dp_shard2 keep bf16"),
    ("llama-tied", "dp_shard2 zero1"),
    ("nemotron", "dp_replicate2 ddp"),
    ("nemotron", "tp2 rows2"),
    ("llama-tied", "tp2 rows2 no-sp recompute"),
    ("dense-head-norms", "tp2 no-sp"),
    ("nemotron-nas", "tp2 rows2 recompute bf16"),
    ("llama", "cp2 rows2 recompute"),
    ("llama-tied", "pp2 rows4"),
    ("mixtral", "pp2 interleaved rows2"),
    ("mixtral-plain", "dp_shard2 ep2 rows4 recompute"),
    ("llama", "cp3 rows1"),
    ("llama-tied", "dp_replicate2 dp_shard2"),
    ("nemotron", "dp_shard2 tp2 rows4"),
    ("llama-tied", "dp_replicate2 tp2 zero1 rows4"),
    ("llama", "pp2 dp_shard2 1f1b rows8"),
    ("llama", "pp2 dp_shard2 gpipe keep rows8"),
    ("llama", "pp2 dp_shard2 interleaved rows4"),
    ("llama-tied", "pp2 dp_shard2 interleaved zero1 rows8"),
    ("llama", "pp2 dp_shard2 zero-bubble ddp rows8"),
    ("llama", "pp2 tp2 zbv rows4"),
    ("mixtral-plain", "dp_shard2 cp2 ep2 zero1 rows4"),
    ("mixtral", "cp2 tp2 ep2 rows2"),
    ("nemotron", "pp2 cp2 tp2 rows4"),
    ("mixtral-plain", "pp2 dp_shard2 cp2 ep2 interleaved rows4"),
    ("mixtral", "dp_replicate2 dp_shard2 cp2 ep4 ddp"),
    ("llama", "pp4 dp_replicate2 rows8"),
    ("mixtral", "pp2 dp_replicate2 dp_shard2 ep2 interleaved rows8"),
]
"""Models and layouts in the words of tests/harness/layouts.py."""


@cache
def by_world():
    """Ranks, to the layouts that need so many."""
    found = {}
    for model, words in LAYOUTS:
        chosen = layouts.choose(model, words)
        found.setdefault(chosen.degrees.world_size, []).append((f"{model} {words}", chosen))
    return dict(sorted(found.items()))


WORLDS = (2, 3, 4, 8)


def counted(chosen):
    """On a rank: `compared` of a step."""
    run, degrees = layouts.Run(chosen), chosen.degrees
    spec, config = layouts.MODELS[chosen.model][0], chosen.config
    if degrees.pp > 1:
        # Once, in its first step, torch's pipeline makes sure that stages agree: 4 bytes.
        run.update()
    batches = run.batches()
    routed = Routed(run.model, spec.plan(config), run.mesh["ep"].get_group()) if degrees.ep > 1 else None
    with CollectiveCounter() as wire:
        train_step(run.state, batches, Counts(100, chosen.rows, 100))
    copies = routed.copies() if routed else []
    each, calls = chosen.rows // degrees.dp, len(copies) // len(batches)
    first = (run.mesh.rank("dp_replicate") * degrees.dp_shard + run.mesh.rank("dp_shard")) * each
    mine = layouts.rows(chosen.rows, chosen.layout.seq)[first : first + each]
    account = step_traffic(
        spec,
        config,
        layout=run.layout,
        adapters=run.adapters,
        policy=chosen.policy,
        batches=[
            Microbatch(
                mask=collate([row]).mask,
                tokens=batch.tokens.shape[1],
                trained=int((batch.labels != IGNORE).sum()),
                copies=copies[i * calls : (i + 1) * calls] if routed else None,
            )
            for i, (row, batch) in enumerate(zip(mine, batches, strict=True))
        ],
        rank=dist.get_rank(),
    )
    return compared(wire, account)


def counted_of(every):
    return [counted(chosen) for chosen in every]


@cache
def measured(world):
    """Of each layout, what `counted` returned on each rank."""
    every = [chosen for _, chosen in by_world()[world]]
    return list(zip(*ranks.run(world, counted_of, every), strict=True))


def test_every_layout_is_counted():
    assert tuple(by_world()) == WORLDS


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_send_what_the_account_says(world):
    for (layout, _), parts in zip(by_world()[world], measured(world), strict=True):
        for rank, part in enumerate(parts):
            for (kind, _), (axes, found, said) in part.items():
                # How many messages a context scheme needs is its plan's affair, and tested there.
                same = found == said or (axes == ("cp",) and kind == "send" and found.payload == said.payload)
                assert same, (layout, rank, kind, axes, found, said)


def around_a_step(rows):
    """On a rank of `tp`: what is counted of a read of metrics, of the question after signals, and of sharing rows."""
    device, reported = torch.device("cpu"), {"aux_loss": torch.ones(()), "expert_load": torch.ones(4)}
    meter = Meter(seq=8, global_batch=1, world_size=2, peak_tflops=None, device=device)
    for step in (1, 2):
        result = StepResult(loss=torch.ones(()), grad_norm=torch.ones(()), lr=0.1, report=reported)
        meter.add(Pending(step, result, 8, 1.0, 0.0))
    feed = SimpleNamespace(mesh=Mesh(Degrees(tp=2), "cpu"))
    counted = []
    for call in (meter.flush, lambda: any_rank(False), lambda: Feed._share(feed, rows)):
        with CollectiveCounter() as wire:
            call()
        counted.append(wire.totals)
    return counted


def test_what_is_sent_around_a_step():
    rows, both = layouts.rows(2), (0, 1)
    numbers = 2 * (1 + 1 + 4) + 1  # of two steps loss and report, and the memory
    for metrics, signals, shared in ranks.run(2, around_a_step, rows):
        assert metrics == {("all_reduce", both): (3, 8 * numbers)}
        assert signals == {("all_reduce", both): (1, 8)}
        (key, total), tokens = *shared.items(), 2 * layouts.SEQ
        assert (key, total.messages) == (("broadcast", both), 2)
        assert 16 * tokens < total.payload < 16 * tokens + 1000


def socket_bytes():
    """All that the TCP sockets of this process have sent, by the kernel's count; None where it keeps none."""
    total = 0
    links = {fd: Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")}
    for fd in (fd for fd, link in links.items() if link.is_symlink() and str(link.readlink()).startswith("socket:")):
        with socket.socket(fileno=os.dup(int(fd))) as twin:
            if twin.family in (socket.AF_INET, socket.AF_INET6) and twin.type == socket.SOCK_STREAM:
                info = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) < TCP_BYTES_SENT + 8:
                    return None
                total += struct.unpack_from("Q", info, TCP_BYTES_SENT)[0]
    return total


def wired(values):
    """On a rank: by kind, bytes that sockets sent for a payload of so many fp32 values for each rank."""
    whole, part = torch.ones(values * dist.get_world_size()), torch.ones(values)
    peer = (dist.get_rank() + 1) % dist.get_world_size()
    calls = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": lambda: [w.wait() for w in (dist.isend(whole, peer), dist.irecv(torch.empty_like(whole)))],
    }
    found = {}
    for kind, call in calls.items():
        call()
        dist.barrier()
        before = socket_bytes()
        call()
        dist.barrier()
        found[kind] = None if before is None else socket_bytes() - before
    return found


def test_gloo_puts_on_the_wire_what_sent_says():
    """In the mean over ranks; of a reduce-scatter gloo makes an all-reduce."""
    world, values = 4, 50_000
    parts = ranks.run(world, wired, values)
    if any(bytes_sent is None for part in parts for bytes_sent in part.values()):
        pytest.skip("this kernel does not count what sockets send")
    whole = 4 * values * world
    payloads = {"all_to_all": whole * (world - 1) // world}
    for kind in parts[0]:
        wanted = sent("all_reduce" if kind == "reduce_scatter" else kind, world, payloads.get(kind, whole))
        assert sum(part[kind] for part in parts) / world == pytest.approx(wanted, rel=0.02), kind


def test_the_table_in_the_docs_is_what_was_counted():
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    wanted = f"{before}{BEGIN}\n\n{_table()}\n{after}"
    if os.environ.get("ZOO_WRITE_DOCS"):
        PAGE.write_text(wanted)
    else:
        assert page == wanted, "docs/layout-traffic.md is old: run with ZOO_WRITE_DOCS=1"


def _table():
    lines = ["| layout | collective | group | messages | counted | formula | sent |", "|---|---|---|---|---|---|---|"]
    for world in WORLDS:
        for (name, _), parts in zip(by_world()[world], measured(world), strict=True):
            lines += [f"| {name if i == 0 else ''} | {row} |" for i, row in enumerate(_rows(parts[0]))]
    return "\n".join(lines) + "\n"


def _rows(part):
    """Of a rank; axes of the same ranks are one group."""
    for (kind, group), (axes, found, said) in part.items():
        wire = round(sent(kind, len(group), found.payload))
        cells = kind, ", ".join(axes), *(f"{n:,}" for n in (found.messages, found.payload, said.payload, wire))
        yield " | ".join(cells)
