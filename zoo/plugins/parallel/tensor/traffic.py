"""What the `tensor` adapter sends: hidden states where the residual meets cut matrices, and sums of what is not cut.

P ranks of `tp`, T tokens of a rank of `cp`, padded to a multiple of P, D model width, R rows that the loss looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zoo import Account, TensorStyle
from zoo.core.contracts.account import COUNT_BYTES, Kind, Microbatch, Weight
from zoo.core.contracts.globs import matches
from zoo.core.contracts.models import CUT_STYLES
from zoo.plugins.parallel.tensor.loss import chunk_rows
from zoo.plugins.parallel.tensor.ranks import in_messages


def account_tensor(account: Account) -> None:
    """Megatron's messages (1909.08053, 2205.05198), of which modules that read the same input share one."""
    styles = _styles(account)
    for name, weight in account.weights.items():
        style = styles.get(name.rpartition(".")[0])
        if style in CUT_STYLES:
            account.weights[name] = _cut(name, weight, style, account.size("tp"))
    for batch in account.batches:
        _hidden(account, batch, styles)
        if account.is_last:
            _loss(account, batch)
    account.afterwards.append(lambda: _parts(account, styles))


def _styles(account: Account) -> dict[str, TensorStyle]:
    """How modules with weights on this rank are cut, by name."""
    held = dict.fromkeys(name.rpartition(".")[0] for name in account.weights)
    return {name: style for name in held for glob, style in account.plan.tensor.items() if matches(name, glob)}


def _cut(name: str, weight: Weight, style: TensorStyle, ranks: int) -> Weight:
    """A P-th of outputs, inputs or words. A rowwise matrix's bias is whole: it is added after the sum."""
    if style == "rowwise" and name.endswith(".bias"):
        return weight
    dim = 1 if style == "rowwise" else 0
    shape = tuple(size // ranks if i == dim else size for i, size in enumerate(weight.shape))
    return replace(weight, shape=shape, mesh=("tp",), cut=("tp",))


def _hidden(account: Account, batch: Microbatch, styles: Mapping[str, TensorStyle]) -> None:
    """`[T, D]` gathered where the residual enters a cut matrix and summed where it leaves one; backward reversed.

    Without sequence parallelism only sums are left: of outputs forward, of inputs' gradients backward.
    """
    enters, leaves, again = _crossings(account, styles)
    entering, leaving = enters * account.forwards, leaves + again * (account.forwards - 1)
    ranks, tokens = account.size("tp"), account.tokens(batch)
    if not account.layout.settings.sequence_parallel:
        sums = leaving + enters + account.is_first + account.is_last
        _states(account, "all_reduce", tokens, sums)
        return
    padded = -(-tokens // ranks) * ranks
    _states(account, "all_gather", padded, entering + leaves + account.is_first + account.is_last)
    _states(account, "reduce_scatter", padded, leaving + enters + account.is_first + account.is_last)


def _states(account: Account, kind: Kind, tokens: int, messages: int) -> None:
    payload = messages * tokens * account.config.hidden_size * account.value_bytes
    account.add(kind, "tp", "hidden states", payload, messages=messages)


def _crossings(account: Account, styles: Mapping[str, TensorStyle]) -> tuple[int, int, int]:
    """How often a microbatch enters cut matrices and leaves them in the blocks here, and leaves when they run again.

    Colwise matrices of one module read one input. A block that runs again stops where nothing more is kept for
    backward, so before a sum that ends it.
    """
    here = account.here(styles)
    enters = {name.rpartition(".")[0] for name in here if styles[name] == "colwise"}
    leaves = [name for name in here if styles[name] == "rowwise"]
    ends = {_last_matrix(account, block) for block in account.blocks}
    return len(enters), len(leaves), len(set(leaves) - ends)


def _last_matrix(account: Account, block: str) -> str:
    names = [name for name in account.within([block]) if len(account.weights[name].shape) > 1]
    return names[-1].rpartition(".")[0] if names else ""


def _loss(account: Account, batch: Microbatch) -> None:
    """Of each row the largest logit, then the sum of exponentials and the target's logit, a chunk at a time."""
    head = next(name for name in account.found(account.plan.last) if account.plan.tensor.get(name) == "vocab")
    words = account.model.get_submodule(head).get_parameter("weight").shape[0] // account.size("tp")
    rows, most = account.loss_rows(batch), chunk_rows(words, account.device)
    chunks = -(-rows // most)
    account.add("all_reduce", "tp", "loss", 3 * rows * account.exact_bytes, messages=2 * chunks)
    if "row_sum" in account.plan.seams and account.experts and account.layout.settings.sequence_parallel:
        account.add("all_reduce", "tp", "counts of a row", account.experts.num_experts * COUNT_BYTES)


def _parts(account: Account, styles: Mapping[str, TensorStyle]) -> None:
    """What data parallelism left of gradients that are parts is summed: of all that is whole under sequence
    parallelism, for a rank saw its own tokens, otherwise of what works on heads.
    """
    everything = account.layout.settings.sequence_parallel
    left = [
        weight.values
        for name, weight in account.weights.items()
        if "tp" not in weight.mesh and weight.values and (everything or styles.get(name.rpartition(".")[0]) == "heads")
    ]
    messages = len(list(in_messages(left, int, lambda _values: account.layout.master_dtype)))
    payload = sum(left) * max(4, account.master_bytes)
    account.add("all_reduce", "tp", "gradients of what is whole", payload, messages=messages)
