"""The contracts of zoo: what a model, a kernel, a scheme, an adapter, a policy and a format say of themselves.

Everything here imports without torch, so that a plugin module can describe what it offers at no cost.
Shape letters: B rows, T tokens of a rank, S key rows, D model width, N query heads, G key/value heads,
H head size, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from zoo.core.attention.layout import SequenceLayout
    from zoo.core.attention.mask import Mask
    from zoo.core.batch import Batch
    from zoo.core.mesh import Mesh
    from zoo.core.rules import Rule
    from zoo.core.tokenizer import Tokenizer

IGNORE = -100
"""Label of a token that is not trained on."""


# Entries: what a registration hook returns --------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A named thing a plugin offers. `target` is "package.module:attribute", imported when first used."""

    name: str
    target: str
    help: str = ""

    def load(self) -> Any:
        """Import the target. Raises whatever the import raises."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry(Entry):
    """A model family; the target is its `ModelSpec`. Everything `zoo models` prints is here."""

    model_type: str
    """The hub's family id, as in config.json (`llama`, `mixtral`)."""
    sizes: Mapping[str, Mapping[str, Any]]
    """Size name to the hub's config.json fields."""
    default_size: str
    """Size used where there are accelerators."""
    hub_ids: Mapping[str, str] = field(default_factory=dict)
    """Size name to the id of its published checkpoint."""
    embedded: Mapping[str, str] = field(default_factory=dict)
    """Size name to the directory of a checkpoint that ships with the plugin."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size name to settings that suit it, as dotted keys of a job: `{"optim.lr": 1e-3}`. A user's word wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionEntry(Entry):
    """An attention backend; the target is a class whose instances are `AttentionBackend`s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSchemeEntry(Entry):
    """A context scheme; the target is a class whose instances are `ContextScheme`s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAdapterEntry(Entry):
    """A parallel adapter; the target is a class whose instances are `ParallelAdapter`s."""

    axes: tuple[str, ...]
    """The mesh axes it gives a meaning to. A degree above 1 on an axis nobody serves is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicyEntry(Entry):
    """A memory policy; the target is a class whose instances are `MemoryPolicy`s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConverterEntry(Entry):
    """A checkpoint format of somebody else's; the target is a `Converter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormatEntry(Entry):
    """A form of training sample; the target is a `DataFormat`: a function from record to `Sample`."""

    overlong: str = "error"
    """What is done by default with a sample longer than a row: `error`, `split`, `truncate`, `drop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerEntry(Entry):
    """A metrics sink asked for with `--track NAME`; the target is called with the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEntry(Entry):
    """A click command; `help` is shown by `zoo --help` without importing the target."""


# Models -------------------------------------------------------------------------------------------

TensorStyle = Literal["colwise", "rowwise", "vocab", "sequence"]
SeamName = Literal["attention", "block", "mlp", "loss", "dispatch", "grouped_matmul"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How a model may be cut, as globs over module names; `*` is one atom. A glob that matches nothing is an error."""

    block: str
    """The unit of FSDP, recompute, compile and pipeline: `model.layers.*`."""
    tensor: Mapping[str, TensorStyle] = field(default_factory=dict)
    expert: tuple[str, ...] = ()
    """Modules whose parameters have experts on dim 0."""
    seams: Mapping[SeamName, str] = field(default_factory=dict)
    """Parameterless submodules made to be replaced."""
    first: tuple[str, ...] = ()
    """Modules only the first pipeline stage needs."""
    last: tuple[str, ...] = ()


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
    Without labels it returns logits `[B, T, V]`; with labels, the *sum* of the token losses, 0-dim.
    `mask` is passed untouched to the attention seam.
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
    rules: Callable[[Any], tuple[Rule, ...]] = lambda _config: ()
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


@dataclass(frozen=True, slots=True)
class AttentionSlice:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """What an attention backend is asked to compute, for `supports`."""

    device: str
    """torch device type: `cpu`, `cuda`."""
    dtype: str
    """`float64`, `float32`, `bfloat16`, `float16`."""
    head_dim: int
    num_heads: int
    num_kv_heads: int


class AttentionBackend(Protocol):
    """A kernel: attention over slices. Knows nothing of ranks, documents or layouts.

    Slices may cover a query row several times (the result is the softmax over all its keys) or never
    (then out is 0 and lse is -inf). Grouped-query heads are not repeated: query head n reads head
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


class ContextScheme(Protocol):
    """How K/V or heads travel between the ranks of one context-parallel group."""

    name: str

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None if it can, otherwise the reason why not, with what to type instead."""

    def layout(self, length: int, degree: int) -> SequenceLayout:
        """The layout it runs best with."""

    def plan(self, mask: Mask, layout: SequenceLayout, rank: int) -> Any:
        """Everything a rank computes and sends for this mask and layout. Host only, once per batch."""

    def forward(
        self, backend: AttentionBackend, plan: Any, group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """This rank's rows of q, k, v to its rows of out and lse, in fp32 or better."""

    def backward(
        self,
        backend: AttentionBackend,
        plan: Any,
        group: ProcessGroup,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of dq, dk, dv, complete over all ranks, in fp32 or better."""


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
    model: str
    config: ModelConfig
    problem: AttentionProblem
    scheme: ContextScheme | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What was chosen for this run, handed to adapters."""

    seq: int
    scheme: ContextScheme | None
    dtype: str
    """Type of the arithmetic."""
    master_dtype: str
    """Type of the weights, of their gradients' sums and of the optimizer state."""


class ParallelAdapter(Protocol):
    """How one kind of parallelism changes a built model, from outside."""

    name: str
    axes: tuple[str, ...]
    phase: Phase

    def check(self, request: LayoutRequest) -> str | None:
        """None, or why this layout cannot work, with the nearest that does. Host only."""

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


# Checkpoints --------------------------------------------------------------------------------------


class TensorSource(Protocol):
    """Named tensors somewhere, read piece by piece."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """torch's name of the stored dtype: `bfloat16`."""

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A piece of one tensor, in its stored dtype. Slices have step 1 and lie inside the shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A checkpoint directory in somebody's published form, opened and checked, no tensor read yet."""

    path: Path
    config: Mapping[str, Any]
    """config.json's fields."""
    tensors: TensorSource
    files: tuple[str, ...]
    """Other files that belong to it (tokenizer, templates), by name."""
    own_names: bool = False
    """Whether the tensors are under the family's own names already, as in a run, so that its rules do not apply."""


class Converter(Protocol):
    """Checkpoints of one form, in and out, streaming: never more than a few tensors in memory."""

    name: str

    def locate(self, source: str) -> Path | None:
        """The local directory a hub id or path means, fetched if need be; None if it is not of this form.

        Raises DataError if it is of this form and cannot be had.
        """

    def open(self, path: Path) -> HubCheckpoint:
        """Check the directory and open it. Raises DataError naming file, tensor and rule."""

    def export(
        self,
        spec: ModelSpec,
        config: Any,
        tensors: TensorSource,
        out: Path,
        *,
        files: Mapping[str, Path],
        dtype: str | None,
    ) -> None:
        """Write a directory of that form from tensors under the family's own names; re-open and verify it.

        `files` are copied byte for byte, except `config.json`, which is the base of the one written. Raises DataError.
        """


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: token ids, and for each whether it is a target of training."""

    tokens: Sequence[int]
    trained: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Record:
    """One raw sample as read, and where it came from."""

    fields: Mapping[str, Any]
    where: object
    """Its str() is the place: `train.jsonl:17`. Not a str itself, because counting lines is work for error messages."""


class DataFormat(Protocol):
    """From a record to a sample."""

    def __call__(self, record: Record, tokenizer: Tokenizer, *, loss_on: str) -> Sample:
        """Raises DataError naming `record.where`."""


class DataSource(Protocol):
    """Records of a corpus in a fixed order, in pieces that can be re-read from any position."""

    @property
    def fingerprint(self) -> str:
        """Changes when the corpus does; a resumed run compares it."""

    def shards(self) -> Sequence[str]:
        """Names of the parts (files). Their number is all that may be held in memory."""

    def read(self, shard: str, offset: int) -> Iterator[tuple[Record, int]]:
        """Records of a part from an offset that `read` returned before (0 is the start), each with the next offset."""


# Observers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run, as observers see it. Rank 0 only."""

    path: Path
    model: str
    size: str
    steps: int
    first_step: int
    world_size: int
    config: Mapping[str, Any]
    """The resolved job."""


class Tracker(Protocol):
    """A metrics sink."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def names(entries: Iterable[Entry]) -> list[str]:
    """Sorted names, for error messages."""
    return sorted(entry.name for entry in entries)
