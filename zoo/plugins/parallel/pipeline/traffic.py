"""What the `pipeline` adapter sends: hidden states from stage to stage, their gradients back, and sums over stages."""

from __future__ import annotations

from zoo import Account
from zoo.core.contracts.account import COUNT_BYTES, Microbatch
from zoo.core.sequence.ranges import share_of
from zoo.plugins.parallel.pipeline.cut import Partition
from zoo.plugins.parallel.pipeline.stages import SCHEDULES, stages_of


def account_pipeline(account: Account) -> None:
    """A message for each microbatch and each stage whose neighbour is on another rank (1806.03377, 2104.04473)."""
    cut = Partition.of(account.model, account.plan, account, account.layout)
    _keep(account, cut)
    rank, ranks, last = account.rank("pp"), account.size("pp"), cut.num_stages - 1
    owner = {stage: r for r in range(ranks) for stage in stages_of(r, ranks, account.layout.settings)}
    for batch in account.batches:
        hidden = _share(account, batch) * cut.hidden_size * account.value_bytes
        for stage in cut.mine:
            if stage < last and owner[stage + 1] != rank:
                account.add("send", "pp", "hidden states", hidden)
                _sums(account, cut, forward=True)
            if stage > 0 and owner[stage - 1] != rank:
                account.add("send", "pp", "gradients of hidden states", hidden)
                _sums(account, cut, forward=False)
    account.add("all_reduce", "pp", "gradient norm", account.master_bytes)
    if account.is_first != account.is_last:
        account.afterwards.append(lambda: _tied(account, cut))


def _tied(account: Account, cut: Partition) -> None:
    """The two ends of a tied model swap the gradients of their shards once a step."""
    for name in cut.tied:
        account.add("send", "pp", "tied gradients", account.weights[name].values * account.master_bytes)


def _share(account: Account, batch: Microbatch) -> int:
    tokens = account.tokens(batch)
    return (
        share_of(tokens, account.rank("tp"), account.size("tp"))
        if account.layout.settings.sequence_parallel
        else tokens
    )


def _sums(account: Account, cut: Partition, *, forward: bool) -> None:
    """What routers did so far: probabilities, whose gradients come back, and counts."""
    if cut.layer_sum:
        account.add("send", "pp", "sums of routers", cut.num_experts * account.exact_bytes)
        if forward:
            account.add("send", "pp", "sums of routers", cut.num_experts * COUNT_BYTES)


def _keep(account: Account, cut: Partition) -> None:
    """Note what `apply` keeps."""
    account.blocks = [block for stage in cut.mine for block in cut.blocks[stage]]
    account.is_first, account.is_last = 0 in cut.mine, cut.num_stages - 1 in cut.mine
    account.pipelined, account.splits = True, SCHEDULES[account.layout.settings.pp_schedule].splits
    account.repeated = cut.tied if account.is_last and not account.is_first else frozenset()
    others = {name for stage in cut.blocks for name in stage} - set(account.blocks)
    for here, ends in ((account.is_first, cut.first), (account.is_last, cut.last)):
        others |= set() if here else set(ends)
    gone = set(account.within(others)) - (cut.tied if cut.holds_end else set())
    account.weights = {name: weight for name, weight in account.weights.items() if name not in gone}
