"""The contracts of zoo: what a model, a kernel, a scheme, an adapter, a policy and a format say of themselves.

Everything here imports without torch, so that a plugin module can describe what it offers at no cost.
Shape letters: B rows, T tokens of a rank, S key rows, D model width, N query heads, G key/value heads,
H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zoo.core.attention.problem import (
    AttentionProblem as AttentionProblem,
    HeadShape as HeadShape,
)
from zoo.core.entries import (
    AttentionEntry as AttentionEntry,
    CommandEntry as CommandEntry,
    ContextSchemeEntry as ContextSchemeEntry,
    ConverterEntry as ConverterEntry,
    DataFormatEntry as DataFormatEntry,
    Entry as Entry,
    MemoryPolicyEntry as MemoryPolicyEntry,
    ModelEntry as ModelEntry,
    ParallelAdapterEntry as ParallelAdapterEntry,
    TrackerEntry as TrackerEntry,
)
from zoo.core.formats import (
    Converter as Converter,
    DataFormat as DataFormat,
    DataSource as DataSource,
    HubCheckpoint as HubCheckpoint,
    Record as Record,
    Remark as Remark,
    RunInfo as RunInfo,
    Sample as Sample,
    TensorSource as TensorSource,
    Tracker as Tracker,
)
from zoo.core.plan import (
    BlockShape as BlockShape,
    ExpertShape as ExpertShape,
    Losses as Losses,
    ParallelPlan as ParallelPlan,
    PipelineSetup as PipelineSetup,
    SeamName as SeamName,
    TensorStyle as TensorStyle,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zoo.core.attention.layout import SequenceLayout
    from zoo.core.attention.mask import Mask
    from zoo.core.attention.wire import Link
    from zoo.core.batch import Batch
    from zoo.core.mesh import Mesh
    from zoo.core.rules import Rule

IGNORE = -100
"""Label of a token that is not trained on."""

PADDING = -1
"""Position of a token of padding: it is in no document, sees nothing, is seen by nobody and trains nothing."""


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


# Attention ----------------------------------------------------------------------------------------


class SliceRule(IntEnum):
    """Which keys of a slice's rectangle a query row sees."""

    FULL = 0
    """All of them."""
    CAUSAL = 1
    """Both ranges have the same length; row i sees keys 0 to i."""
    ANTICAUSAL = 2
    """Both ranges have the same length; row i sees keys i to the end. Core turns it into CAUSAL for kernels."""


class AttentionSlice(NamedTuple):
    """A rectangle of scores in local rows: queries `[q_start, q_stop)`, keys `[k_start, k_stop)`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    rule: SliceRule

    @property
    def area(self) -> int:
        """Number of scores the rule leaves visible."""
        rows, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return rows * keys if self.rule is SliceRule.FULL else rows * (rows + 1) // 2


class AttentionBackend(Protocol):
    """A kernel: attention over slices. Knows nothing of ranks, documents or layouts.

    Slices are FULL or CAUSAL. They may cover a query row several times (the result is the softmax over all its keys)
    or never (then out is 0 and lse is -inf). Grouped-query heads are not repeated: query head n reads head
    n // (N // G).
    """

    name: str

    def supports(self, problem: AttentionProblem) -> str | None:
        """None if it can compute the problem, otherwise the reason why not."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[AttentionSlice], scale: float
    ) -> tuple[Tensor, Tensor]:
        """q `[B, N, T, H]`, k and v `[B, G, S, H]`, last stride 1, to out `[B, N, T, H]` and lse `[B, N, T]`.

        lse is fp32 or better, so that partial results can be merged without loss; out too, unless the kernel itself
        rounds to q's dtype.
        """

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        slices: Sequence[AttentionSlice],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of these slices given the row's *final* out and lse: dq, dk, dv, in dtypes as out's forward."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rank sends, in bytes, while it computes so many scores (visible pairs times query heads)."""

    sent: int
    scores: int


class ContextPlan(Protocol):
    """Everything a rank computes and sends for one mask, layout and shape of heads. Made on the host."""

    def stages(self, value_bytes: int, gradient_bytes: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Forward and backward as stages, one after another; bytes are those of one number of K/V and of dK/dV.

        They say for one row of a batch what will be sent and what hides it; tests hold the wire against them.
        """


class ContextScheme(Protocol):
    """How K/V or heads travel between the ranks of one context-parallel group."""

    name: str
    splits_rows: bool
    """Whether a rank computes the rows it holds. If not (heads are dealt out), the layout need not balance scores."""

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None if it can, otherwise the reason why not, with what to type instead."""

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int, heads: HeadShape) -> ContextPlan:
        """Everything a rank computes and sends for this mask and layout. Host only, once per batch."""

    def forward(
        self, backend: AttentionBackend, plan: Any, link: Link, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """This rank's rows of q, k, v to its rows of out, and what backward needs.

        What backward needs ends with out and lse of the rows and heads that this rank computed.
        """

    def backward(
        self, backend: AttentionBackend, plan: Any, link: Link, dout: Tensor, saved: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of dq, dk, dv, complete over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a scheme is expected to cost one layer of one kind, forward and backward together."""

    sent: tuple[int, int]
    """Bytes that the busiest rank sends, forward and backward."""
    hidden: float
    """Share of the time on the wire that computation hides."""
    seconds: float
    compute_seconds: float
    """Of these, what computation alone would take on the busiest rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSetup:
    """How rows are shared out over `cp`, as chosen."""

    schemes: Mapping[int | None, ContextScheme]
    """By the sliding window of a layer."""
    windows: Mapping[int | None, int]
    """How many layers have which window."""
    balance: str = "auto"
    """auto, head-tail, balanced or contiguous."""
    wire: str | None = None
    """Type in which numbers travel, if not their own."""


# Layout and memory --------------------------------------------------------------------------------


class Phase(IntEnum):
    """Order of application. Mathematics fixes it, so core sorts by it and plugin order never matters."""

    SPLIT = 10
    """Pipeline: keep this stage."""
    SHARD = 20
    """Tensor and expert parallel: place parameters."""
    EXCHANGE = 30
    """Context parallel: replace the attention seam."""
    RECOMPUTE = 40
    """Memory policies."""
    COMPILE = 50
    WRAP = 60
    """Data parallel last: it must see the final parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRequest:
    """A layout to be checked on the host, before any process starts."""

    degrees: Mapping[str, int]
    """Mesh axis to degree."""
    seq: int
    """Global length of a row in tokens."""
    micro_batch: int = 1
    """Rows that a rank's forward sees at once, laid end to end."""
    model: str
    config: ModelConfig
    problem: AttentionProblem
    """Of the heads that most layers have, as a rank of `tp` holds them."""
    heads: Mapping[HeadShape, int] = field(default_factory=dict)
    """How many layers have which heads, in whole, the problem's first; empty where all have the problem's."""
    windows: Mapping[int | None, int] = field(default_factory=dict)
    """How many layers have which sliding window; None is no window."""
    schemes: Mapping[int | None, ContextScheme] = field(default_factory=dict)
    """The context scheme of layers by their window; empty without context parallelism."""
    experts: ExpertShape | None = None
    """The model's experts, if it has any."""
    pipeline: PipelineSetup = field(default_factory=PipelineSetup)
    widths: Sequence[tuple[str, int]] = ()
    """Modules that the plan's `tensor` cuts, as globs, and how long the dim is that is cut; empty without `tp`."""
    sequence_parallel: bool = True
    """Whether `tp` also cuts what sees tokens one by one."""
    reshard: bool = True
    """Whether a block's weights are to be given up after its forward."""
    overlap_tensor: bool = False
    """Whether products of `tp` overlap their messages."""

    @property
    def problems(self) -> tuple[AttentionProblem, ...]:
        """The attention of every kind of layer, as a rank of `tp` holds it."""
        degree = self.degrees.get("tp", 1)
        return tuple(self.problem.of(heads.over(degree)) for heads in self.heads) or (self.problem,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What was chosen for this run, handed to adapters."""

    seq: int
    context: ContextSetup | None
    dtype: str
    """Type of the arithmetic."""
    master_dtype: str
    """Type of the weights, of their gradients' sums and of the optimizer state."""
    data_parallel: str = "fsdp"
    """The adapter that decides how weights live over dp_replicate x dp_shard x cp."""
    reshard: bool = True
    pipeline: PipelineSetup = field(default_factory=PipelineSetup)
    sequence_parallel: bool = True
    """Whether tensor parallelism cuts the residual on tokens."""
    overlap_tensor: bool = False
    """Whether products of `tp` overlap their messages."""
    model: str = ""
    """Name of the family, for messages."""


class ParallelAdapter(Protocol):
    """How one kind of parallelism changes a built model, from outside.

    May be `zoo.core.order.Accumulating` and `Completing` and `zoo.core.state_memory.Holding` too.
    """

    name: str
    axes: tuple[str, ...]
    phase: Phase

    def check(self, request: LayoutRequest) -> str | None:
        """None, or why this layout cannot work; core finds the nearest that do. Host only, and cheap: asked often."""

    def applies(self, degrees: Mapping[str, int], setup: Setup) -> bool:
        """Whether there is anything to do, usually: one of its axes exceeds 1."""

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, setup: Setup) -> nn.Module:
        """Change the model in place (or wrap it) for this rank. Called only when it applies."""

    def shard_batch(self, batch: Batch, mesh: Mesh, setup: Setup) -> Batch:
        """This rank's part of a batch. Most adapters return it unchanged."""


class MemoryPolicy(Protocol):
    """One way to trade memory for time or traffic."""

    name: str

    def apply(self, model: nn.Module, plan: ParallelPlan) -> nn.Module:
        """Replace seams of the model."""

    def saved_bytes(self, config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
        """Activation bytes a rank with that many tokens keeps for backward."""
