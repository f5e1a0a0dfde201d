"""What all tests have in common: an environment that is the same everywhere, and fixtures of several folders."""

import gc
import os
from collections import Counter

from hypothesis import HealthCheck, settings

from tests.harness.distributions import distributions
from zoo.testing import ranks

__all__ = ["distributions"]

# The pool of ranks and the commands of tests are forked from one process.
ranks.IMPORTED[:] = ["tests.harness.warm_imports"]

FOREIGN = (
    *("ZOO_", "SLURM_", "TORCHELASTIC_", "HF_", "TRANSFORMERS_", "HUGGING_FACE_", "GROUP_", "ROLE_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR"),
    *("COLUMNS", "LINES", "PYTHONWARNINGS", "CUBLAS_WORKSPACE_CONFIG"),
)
"""Beginnings of variables that whoever starts the tests may have and that mean something to zoo or its libraries."""

for name in [name for name in os.environ if name.startswith(FOREIGN) and name != "ZOO_WRITE_DOCS"]:
    del os.environ[name]
# A hub on this machine is asked without the proxy of the network around it.
os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
# Workers of xdist share the cores. With a thread of each for every core all of them wait for each other most of the
# time, and sums are added in an order that depends on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, and nothing of zoo.
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")


def pytest_collection_modifyitems(items):
    """Files that start ranks come first, those with the fewest tests before the others: theirs are the longest.

    Left to the end they would keep one worker busy for minutes while the other has nothing to do.
    """
    starts_ranks = {item.path for item in items if item.get_closest_marker("dist")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in starts_ranks, tests[item.path] if item.path in starts_ranks else 0))


def pytest_collection_finish():
    """What is imported by now stays, so looking through it again for garbage would find nothing."""
    gc.freeze()
