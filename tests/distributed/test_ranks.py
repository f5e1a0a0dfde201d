"""The harness of real ranks: results in order, failures with their traceback, recovery after them."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.patience import PATIENCE_S
from zoo.testing import ranks


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


def _hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(PATIENCE_S)


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
def test_a_broken_rank_is_named_and_the_next_run_works():
    pool = ranks.RankPool()
    try:
        for broken, message in ((_raise_on, "seven is not eight"), (_die_on, "exit code 3")):
            with pytest.raises(ranks.RankError, match=f"(?s)rank 1.*{message}"):
                pool.run(2, broken, 1)
        assert pool.run(2, _total, 0)[0][0] == 1
        # On a busy machine the other may not be done in so short a time either.
        with pytest.raises(ranks.RankError, match=r"ranks \[0(, 1)?\] of 2 were not done in 1 s"):
            pool.run(2, _hang_on, 0, timeout=1.0)
    finally:
        pool.close()
