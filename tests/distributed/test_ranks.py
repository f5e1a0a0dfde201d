"""The harness of real ranks: results in order, failures with their traceback, recovery after them."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed import ranks


def _total(value):
    x = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(x)
    return x.item(), dist.get_rank(), os.environ["WORLD_SIZE"]


def _process():
    return os.getpid()


def _raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("seven is not eight")
    dist.barrier()


def _die_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


@pytest.mark.dist
def test_results_come_in_rank_order_for_any_world_size():
    for world in (2, 3, 1):
        expected = sum(5 + rank for rank in range(world))
        assert ranks.run(world, _total, 5) == [(expected, rank, str(world)) for rank in range(world)]


@pytest.mark.dist
def test_processes_are_kept_between_runs_and_world_sizes():
    first = ranks.run(3, _process)
    assert ranks.run(2, _process) == first[:2]
    assert ranks.run(3, _process) == first
    assert len(set(first)) == 3


@pytest.mark.dist
@pytest.mark.parametrize(("broken", "message"), [(_raise_on, "seven is not eight"), (_die_on, "exit code 3")])
def test_a_broken_rank_is_named_and_the_next_run_works(broken, message):
    pool = ranks.RankPool()
    try:
        with pytest.raises(ranks.RankError, match=message) as caught:
            pool.run(2, broken, 1)
        assert "rank 1" in str(caught.value)
        assert pool.run(2, _total, 0)[0][0] == 1
    finally:
        pool.close()


@pytest.mark.dist
def test_a_hanging_rank_is_ended():
    pool = ranks.RankPool()
    try:
        pool.run(2, _process)
        with pytest.raises(ranks.RankError, match=r"ranks \[0\] of 2 were not done in 1 s"):
            pool.run(2, _hang_on_zero, timeout=1.0)
    finally:
        pool.close()


def _hang_on_zero():
    if dist.get_rank() == 0:
        torch.zeros(1)
        while True:
            pass
