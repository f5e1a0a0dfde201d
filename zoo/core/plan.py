"""What a model says of its parts and of its losses: how it may be cut, its seams, its experts.

Reached through `zoo.core.contracts`; imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TensorStyle = Literal["colwise", "rowwise", "vocab", "sequence", "heads"]
"""How `tp` treats a module, see `ParallelPlan.tensor`."""
CUT_STYLES: tuple[TensorStyle, ...] = ("colwise", "rowwise", "vocab")
"""The styles that cut a module's parameters; under the others every rank has them whole."""
SeamName = Literal[
    "attention", "block", "mlp", "loss", "dispatch", "grouped_matmul", "layer_sum", "row_sum", "row_part"
]
"""A place in a model where what a parallel layout needs replaces a module without parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How a model may be cut, as globs over module names; `*` is one atom. A glob that matches nothing is an error."""

    block: str
    """The unit of FSDP, recompute, compile and pipeline: `model.layers.*`."""
    tensor: Mapping[str, TensorStyle] = field(default_factory=dict)
    """What `tp` does to modules. `colwise` cuts outputs, `rowwise` inputs, `vocab` words.

    Two styles leave a module whole on every rank: `sequence` works on the residual, as a layer's norm does; `heads`
    works on one head at a time, as a norm of query and key heads does, and a rank applies it to its own heads. Name
    every module with parameters that is not an expert: without sequence parallelism the style says whether the ranks'
    gradients are equal or parts of a sum."""
    expert: tuple[str, ...] = ()
    """Modules whose parameters have experts on dim 0."""
    seams: Mapping[SeamName, str] = field(default_factory=dict)
    """Parameterless submodules made to be replaced."""
    first: tuple[str, ...] = ()
    """Modules only the first pipeline stage needs."""
    last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """The sizes of a model's experts, stacked as `[E, I, D]` and `[E, D, I]`."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    per_token: int = 1
    """How many of them a token goes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What a pipeline must know of a block to deal it out."""

    matrix_values: int
    seams: frozenset[SeamName] = frozenset()
    """Those that lie in it."""


class Losses(NamedTuple):
    """What a model returns with labels if it has more to say than the sum of its token losses.

    Everything is this rank's part, and parts add up over the ranks that share a row. The loss of a step is the sum of
    `tokens` over its trained tokens, plus the mean of `rows` over its rows: a microbatch counts for as many as it has.
    """

    tokens: Tensor
    """Sum of the token losses, 0-dim."""
    rows: Tensor | float = 0.0
    """What counts once a row, as an auxiliary loss times its coefficient, 0-dim; in the mean over the batch's rows."""
    report: Mapping[str, Tensor] = {}
    """Metrics by name, no gradient, 0-dim or vectors: their mean over the rows of a step is logged."""
    token_report: Mapping[str, Tensor] = {}
    """The same for metrics that are means over tokens: theirs over all tokens of a step that are no padding."""
