"""What ranks really hand to their collectives is what the account of the layout says, message by message.

What the first rank of each layout was counted to send is a table in the docs.
`ZOO_WRITE_DOCS=1 pytest tests/distributed/test_traffic.py` writes it into docs/layout-traffic.md; without that the test
compares.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import layouts
from tests.distributed import ranks
from zoo.core.batch import collate
from zoo.core.contracts import IGNORE
from zoo.core.step import train_step
from zoo.core.traffic import Microbatch, sent, step_traffic
from zoo.testing.traffic import Routed, Wire, compared

pytestmark = pytest.mark.dist

PAGE = Path(__file__).parents[2] / "docs" / "layout-traffic.md"
BEGIN, END = "<!-- bytes: written by tests/distributed/test_traffic.py -->", "<!-- end of bytes -->"
LAYOUTS = [
    ("llama", "dp_shard2"),
    ("llama", "dp_shard2 keep bf16"),
    ("llama-tied", "dp_shard2 zero1"),
    ("nemotron", "dp_replicate2 ddp"),
    ("nemotron", "tp2 rows2"),
    ("llama-tied", "tp2 rows2 no-sp recompute"),
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
]
"""Models and layouts in the words of tests/layouts.py."""


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
    with Wire() as wire:
        train_step(run.state, batches, 100, chosen.rows)
    copies = routed.copies() if routed else []
    each, calls = chosen.rows // degrees.dp, len(copies) // len(batches)
    first = (run.mesh.rank("dp_replicate") * degrees.dp_shard + run.mesh.rank("dp_shard")) * each
    mine = layouts.rows(chosen.rows, chosen.setup.seq)[first : first + each]
    account = step_traffic(
        spec,
        config,
        degrees=degrees,
        setup=run.setup,
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
    return list(zip(*ranks.run(world, counted_of, every, timeout=layouts.TIMEOUT_S), strict=True))


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
