"""The same command under another layout is the same function: loss and gradient norm of real runs, in fp64."""

from __future__ import annotations

import pytest

from tests.harness import command
from tests.harness.pooled_command import train

JOB = ("llama3", "--seq", "1k", "--dtype", "float64", "--steps", "4", "--seed", "0")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single") / "run", *JOB, "--global-batch", "2")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("scheme", "cp"),
    [("ring", 2), ("ring", 8), ("allgather", 4), ("halo", 2), ("ulysses", 4), ("hybrid:2", 4), ("auto", 3)],
)
def test_context_parallel_runs_equal_one_process(scheme, cp, single, tmp_path):
    """Eight ranks are processes of their own, as the command starts them."""
    run = (command.train if cp == 8 else train)(
        tmp_path / "run", *JOB, "--global-batch", "2", "--cp", cp, "--cp-scheme", scheme
    )
    assert_same(run, single)


@pytest.mark.dist
@pytest.mark.parametrize("layout", [("--dp-shard", 2), ("--dp-shard", 2, "--cp", 2, "--memory", "full")])
def test_data_parallel_runs_equal_one_process(layout, single, tmp_path):
    run = train(tmp_path / "run", *JOB, "--global-batch", "2", *layout)
    assert_same(run, single)


@pytest.mark.dist
def test_tensor_parallel_runs_equal_one_process(single, tmp_path):
    """Of four query and two K/V heads a rank of tp has two and one, which ulysses deals out to two ranks of cp."""
    run = train(
        tmp_path / "run",
        *JOB,
        "--global-batch",
        "2",
        "--tp",
        2,
        "--cp",
        2,
        "--cp-scheme",
        "ulysses",
        "--memory",
        "full",
    )
    assert_same(run, single)


def test_microbatches_do_not_matter(single, tmp_path):
    run = train(tmp_path / "run", *JOB, "--global-batch", "2", "--set", "data.micro_batch=2", "--memory", "full")
    assert_same(run, single)


def assert_same(run, single):
    assert [row["step"] for row in run] == [1, 2, 3, 4]
    for row, wanted in zip(run, single, strict=True):
        assert row["trained_tokens"] == wanted["trained_tokens"]
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-9), (row["step"], key)
