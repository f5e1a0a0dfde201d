"""Every scheme and every mask is the same function: loss and gradient norm of real runs, in fp64."""

from __future__ import annotations

import inspect
import json
import textwrap
from functools import cache

import pytest

from tests.distributed.test_equality import assert_same
from tests.harness.pooled_command import train

pytestmark = pytest.mark.dist

JOB = ("llama3", "--seq", "1k", "--dtype", "float64", "--steps", "4", "--seed", "0")
MIXED = "model.layer_types=[sliding_attention, full_attention]"
MASKS = {
    "window": ("--set", "model.sliding_window=100"),
    "a window in one layer": ("--set", "model.sliding_window=100", "--set", MIXED),
    "full": ("--set", "attention.mask=full"),
    "prefix": ("--set", "attention.mask=prefix"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts and completions of many lengths, so that prefixes are real."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = inspect.getsource(textwrap).split()
    rows = [
        {"prompt": " ".join(words[i : i + 7 + 13 * i % 90]), "completion": " " + " ".join(words[i + 200 : i + 230])}
        for i in range(0, 400, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory, prompts):
    """The same job in one process, once for each mask."""

    @cache
    def run(mask):
        return train(tmp_path_factory.mktemp("single") / "run", *JOB, "--data", prompts, *MASKS[mask])

    return run


# Every scheme where layers differ, every mask twice or more; all pairs, on up to eight ranks, are in tests/plugins.
PAIRS = [
    *(("a window in one layer", scheme) for scheme in ("ring", "allgather", "ulysses", "hybrid", "halo")),
    *(("window", scheme) for scheme in ("ulysses", "halo")),
    *(("full", scheme) for scheme in ("ring", "allgather")),
    *(("prefix", scheme) for scheme in ("ring", "hybrid")),
]


@pytest.mark.parametrize(("mask", "scheme"), PAIRS)
def test_every_scheme_and_every_mask_equals_one_process(mask, scheme, single, prompts, tmp_path):
    # Four ranks where heads and K/V both have somewhere to go, two where that is all the scheme needs.
    cp = 4 if scheme == "hybrid" else 2
    run = train(tmp_path / "run", *JOB, "--data", prompts, *MASKS[mask], "--cp", cp, "--cp-scheme", scheme)
    assert_same(run, single(mask))


def test_masks_are_different_functions(single):
    losses = {mask: single(mask)[0]["loss"] for mask in MASKS}
    assert len(set(losses.values())) == len(MASKS), losses


@pytest.mark.parametrize(
    "more",
    [
        ("--cp", 3, "--cp-scheme", "ring,halo"),
        ("--cp", 2, "--set", "layout.cp_balance=contiguous", "--dp-shard", 2, "--global-batch", 2),
    ],
    ids=str,
)
def test_layers_with_two_schemes_and_ranks_with_uneven_rows_equal_one_process(more, prompts, single, tmp_path):
    mask = "a window in one layer"
    job = (*JOB, "--data", prompts, *MASKS[mask])
    wanted = single(mask) if "--global-batch" not in more else train(tmp_path / "one", *job, "--global-batch", 2)
    assert_same(train(tmp_path / "run", *job, *more), wanted)
