"""Contract of a model family: what it is, how it may be cut, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from zoo.core.contracts.attention import HeadShape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zoo.core.contracts.weights import Rule


# Models -------------------------------------------------------------------------------------------


class ModelConfig(Protocol):
    """What core asks of any family's config. Fields carry the hub's names."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model family: single-device torch code plus what the engine must know about it.

    The built module takes `(tokens [B, T], positions [B, T] = None, mask = None, labels [B, T] = None)`.
    Without labels it returns logits `[B, T, V]`; with labels, the *sum* of the token losses, 0-dim, or `Losses`.
    `mask` is passed untouched to the attention seam. Positions restart at each document and are `PADDING` outside of
    all. What a model sums or means over tokens must leave padding out; where positions index a table, clamp them to 0.
    """

    name: str
    model_type: str
    parse: Callable[[Mapping[str, Any]], Any]
    """From config.json's fields to the family's config. Raises DataError."""
    hub_config: Callable[[Any], dict[str, Any]]
    """The inverse: fields that transformers 4 and 5 read alike."""
    build: Callable[[Any], nn.Module]
    """Parameters on the current default device and dtype, initialised unless that device is meta."""
    plan: Callable[[Any], ParallelPlan]
    flops_per_token: Callable[[Any, float], float]
    """(config, mean number of keys a token sees) to forward plus backward FLOPs."""
    optional_fields: tuple[str, ...] = ()
    """Fields of config.json that may be set though `hub_config` leaves them out while they say nothing."""
    heads: Callable[[Any], Sequence[HeadShape]] = lambda config: [HeadShape.of(config)] * config.num_hidden_layers
    """The heads of each attention layer."""
    windows: Callable[[Any], Sequence[int | None]] = lambda config: [None] * config.num_hidden_layers
    """The sliding window of each attention layer in tokens, the token itself included; None where there is none."""
    experts: Callable[[Any], ExpertShape | None] = lambda _config: None
    """The experts of a mixture; None if the model has none."""
    rules: Callable[[Any], tuple[Rule, ...]] = lambda _config: ()
    """From the module's names to the one form on disk that is written."""
    forms: Callable[[Any], tuple[tuple[Rule, ...], ...]] = lambda _config: ()
    """Rules of other forms that exist on disk and are read. The names in a checkpoint tell which one it has."""
    override: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda fields, over: {**fields, **over}
    """`hub_config`'s fields with some set anew, kept consistent where one fact has several fields (RoPE)."""
    init_buffers: Callable[[nn.Module, Any], None] = lambda _model, _config: None
    """Fill non-persistent buffers in place after `to_empty`."""


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
