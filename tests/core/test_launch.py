"""What a launcher makes of the ends of its ranks."""

import pytest

from zoo.core.errors import NumericsError, SavedOnSignal, UsageError, ZooError
from zoo.core.launch import TRAINING, Office, WorkerDied


class Failure:
    """What torch raises when ranks failed: exit codes by rank."""

    def __init__(self, **exit_codes):
        self.failures = {int(rank[1:]): type("Ended", (), {"exitcode": code}) for rank, code in exit_codes.items()}


@pytest.mark.parametrize("error", [UsageError("a"), NumericsError("b", 3), SavedOnSignal("c"), ZooError("d")])
def test_a_ranks_own_word_is_raised_as_it_is(tmp_path, error):
    office = Office(tmp_path)
    office.report(0, RuntimeError("connection closed by peer"))
    office.report(1, error)
    found = office.verdict(Failure(r0=1, r1=1), TRAINING)
    assert type(found) is type(error)
    assert str(found) == str(error)


def test_a_killed_rank_comes_before_what_its_peers_say_of_it(tmp_path):
    office = Office(tmp_path)
    office.report(0, RuntimeError("connection closed by peer"))
    found = office.verdict(Failure(r0=1, r1=-9), TRAINING)
    assert isinstance(found, WorkerDied)
    assert found.what == "rank 1 was killed by SIGKILL (often: out of memory)"
    assert str(found).endswith("The same command resumes from the last finished checkpoint")


def test_an_unexpected_exception_is_the_death_of_its_rank(tmp_path):
    office = Office(tmp_path)
    office.report(2, KeyError("x"))
    found = office.verdict(Failure(r2=1), TRAINING)
    assert found.what == "rank 2 failed: KeyError: 'x'"
    assert "ZOO_DEBUG=1 shows where" in str(found)
