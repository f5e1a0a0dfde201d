"""What a launcher makes of the ends of its ranks."""

import pytest

from zoo.core.bootstrap import start_file
from zoo.core.errors import DataError, NumericsError, SavedOnSignal, UsageError, ZooError
from zoo.core.launch import TRAINING, Office, WorkerDied


class Failure:
    """What torch raises when ranks failed: exit codes by rank, in the order in which they ended."""

    def __init__(self, **exit_codes):
        self.failures = {
            int(rank[1:]): type("Ended", (), {"exitcode": code, "timestamp": at})
            for at, (rank, code) in enumerate(exit_codes.items())
        }


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


def test_a_rank_that_could_not_start_is_quoted_and_its_peers_are_not_blamed(tmp_path):
    office = Office(tmp_path)
    office.report(0, RuntimeError("connection closed by peer"))
    office.check_in(0)
    start_file(tmp_path, 1).write_text('Traceback:\n  File "random.py", line 1, in <module>\nRuntimeError: not yours\n')
    found = office.verdict(Failure(r1=1, r0=1, r2=-15), TRAINING)
    assert found.what == (
        "rank 1 ended with status 1 before it could say why; its last words: RuntimeError: not yours "
        '(File "random.py", line 1, in <module>)'
    )


def test_ranks_that_the_launcher_ends_are_no_cause(tmp_path):
    found = Office(tmp_path).verdict(Failure(r0=-15, r1=3), TRAINING)
    assert found.what == "rank 1 ended with status 3 before it could say why"


def test_a_plugins_own_error_does_not_stand_in_for_one_of_zoo(tmp_path):
    class Mine(DataError):
        """Like those that plugins define."""

    Office(tmp_path).report(0, Mine("a"))
    assert type(Office(tmp_path).verdict(Failure(r0=1), TRAINING)) is DataError
