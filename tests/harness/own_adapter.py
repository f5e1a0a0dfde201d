"""Data-parallel adapters as a plugin of somebody else has them: zoo's own under names that zoo does not know."""

from zoo.plugins.parallel.data_parallel.ddp import ReplicatedData
from zoo.plugins.parallel.data_parallel.zero1 import ShardedOptimizer


class OwnReplicas(ReplicatedData):
    """Whole weights on every rank."""

    name = "own-replicas"


class OwnOptimizer(ShardedOptimizer):
    """A distributed optimizer."""

    name = "own-optimizer"
