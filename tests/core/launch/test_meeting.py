"""Ranks that a wrapper numbered: what cannot be one job is a line on all that are there, at once."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

from tests.harness.patience import PATIENCE_S
from zoo.core.errors import UsageError
from zoo.core.launch.meeting import introduce, meeting_place
from zoo.core.machine.launcher_env import OuterRank


def rank(number, world_size):
    return OuterRank(rank=number, world_size=world_size, local_rank=None, local_world_size=None)


def meet(*ranks, store=None):
    """What each of some ranks is told, None if nothing is wrong."""
    store = store or HashStore()

    def told(one):
        try:
            introduce(store, one)
        except UsageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(told, ranks, timeout=PATIENCE_S))


def test_ranks_that_fit_meet_and_meet_again():
    store = HashStore()
    for number in range(2):
        assert meet(*(rank(r, 3) for r in range(3)), store=PrefixStore(f"{number}", store)) == [None] * 3


def test_two_processes_with_one_number_are_told_on_all_ranks():
    """One number is missing, so without a word they would wait for it."""
    said = set(meet(rank(0, 3), rank(1, 3), rank(1, 3)))
    assert len(said) == 1
    assert "RANK is 1 for two processes: process " in said.pop()


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (2, 200)])
def test_ranks_that_count_differently_are_told_on_all_of_them(first, second):
    (said,) = set(meet(rank(0, first), rank(1, second)))
    assert said.startswith("WORLD_SIZE is ")
    assert f"{first} on rank 0" in said
    assert f"{second} on rank 1" in said
    assert said.endswith("set it to the same on all ranks")


def test_one_that_comes_too_many_is_told_alone():
    store = HashStore()
    assert meet(rank(0, 2), rank(1, 2), store=store) == [None, None]
    assert "RANK is 1 for two processes" in meet(rank(1, 2), store=store)[0]


def test_a_port_that_another_program_has_is_one_line(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "ZOO_STORE_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UsageError, match=f"^MASTER_PORT {port} cannot be opened on rank 0: .*in use; .*free one"):
            meeting_place(rank(0, 2))
