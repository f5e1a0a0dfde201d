"""What launchers say in the environment: every combination is a rank, no launcher, or one sentence."""

import pytest

from zoo.core.errors import UsageError
from zoo.core.machine.launcher_env import OuterRank, speaks

TORCHRUN = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
}


def test_what_torchrun_says_is_understood():
    assert OuterRank.from_environment(TORCHRUN) == OuterRank(rank=1, world_size=2, local_rank=1, local_world_size=2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": " ", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_what_no_launcher_of_ranks_leaves_means_nothing(environment):
    assert OuterRank.from_environment(environment) is None


@pytest.mark.parametrize("more", [{}, {"LOCAL_RANK": ""}, {"LOCAL_RANK": "0", "MASTER_PORT": "nowhere"}])
def test_one_rank_needs_no_place_to_meet(more):
    found = OuterRank.from_environment({"RANK": "0", "WORLD_SIZE": "1", **more})
    assert (found.rank, found.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": "abc"}, "RANK is 'abc': a launcher sets it to a number from 0 up"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK is '1_0'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: it must be less"),
        ({"RANK": ""}, "WORLD_SIZE is 2 and RANK is not set: a launcher sets both"),
        ({"WORLD_SIZE": ""}, "RANK is 1 and WORLD_SIZE is not set: a launcher sets both"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': a launcher sets it to a number from 1 up"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2: it must be less"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2 and MASTER_ADDR is not set, so ranks cannot find each other"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2 and MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': it must be a number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ],
)
def test_what_makes_no_sense_is_one_sentence_with_a_way_out(change, says):
    with pytest.raises(UsageError) as raised:
        OuterRank.from_environment(TORCHRUN | change)
    assert says in str(raised.value)
    assert str(raised.value).endswith(("unset RANK and WORLD_SIZE", "the same on all ranks"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("local_rank", "count", "index"),
    # A launcher that shows each rank its own accelerator only still numbers them.
    [("0", 4, 0), ("1", 4, 1), ("1", 1, 0), ("", 1, 0)],
)
def test_a_rank_takes_the_accelerator_of_its_number(local_rank, count, index):
    assert OuterRank.from_environment(TORCHRUN | {"LOCAL_RANK": local_rank}).device_index(count) == index


@pytest.mark.parametrize(("local_rank", "says"), [("", "LOCAL_RANK is not set"), ("5", "LOCAL_RANK is 5")])
def test_an_accelerator_is_never_guessed(local_rank, says):
    outer = OuterRank.from_environment(TORCHRUN | {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": ""})
    with pytest.raises(UsageError, match=says):
        outer.device_index(4)


@pytest.mark.parametrize(("said", "first"), [(None, True), ("", True), ("0", True), ("1", False), ("abc", False)])
def test_the_first_rank_speaks_for_all(monkeypatch, said, first):
    if said is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", said)
    assert speaks() is first
