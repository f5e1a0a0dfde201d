"""One rank's book of what it sends in a training step. Adapters write it, in the order in which they are applied.

Each accounts for its own part: what it sends, and how the weights lie on this rank once it is done. Bytes are payloads,
which no library's algorithm changes; see `zoo.core.plan.traffic`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from zoo.core.contracts.globs import find_modules
from zoo.core.mesh.degrees import EVERY_AXIS, Degrees, coordinates, groups

if TYPE_CHECKING:
    from torch import nn

    from zoo.core.contracts.layout import Layout
    from zoo.core.contracts.models import ExpertShape, ModelSpec, ParallelPlan
    from zoo.core.sequence.mask import Mask


Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "broadcast"]

COUNT_BYTES = 8
"""Of a number of tokens."""


class Total(NamedTuple):
    """Messages of one kind in one group, and the bytes of their payload."""

    messages: int = 0
    payload: int = 0

    def plus(self, messages: int, payload: int) -> Total:
        """With some more."""
        return Total(self.messages + messages, self.payload + payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What goes through one kind of collective in one group for one purpose, in a step."""

    kind: Kind
    axis: str
    what: str
    messages: int
    payload: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What must be known of a microbatch."""

    mask: Mask
    """Of its rows laid end to end."""
    tokens: int | None = None
    """Of this rank of `cp`; None: an even share."""
    trained: int | None = None
    """Those of them that have a label; None: all."""
    copies: Sequence[tuple[int, int]] | None = None
    """Of each block with experts here, copies of tokens that go to other ranks of `ep` and come from them; None: what
    balanced routers do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A parameter as it lies on a rank."""

    shape: tuple[int, ...]
    mesh: tuple[str, ...] = ()
    """Axes of the mesh on which it is a DTensor; empty if it is a plain tensor."""
    cut: tuple[str, ...] = ()
    """Those of them whose ranks have different parts."""

    @property
    def values(self) -> int:
        return prod(self.shape)


@dataclass(slots=True, kw_only=True)
class Account:
    """One rank's book of a step. Adapters read all of it and write `flows`, `weights`, `blocks` and `is_first` on."""

    spec: ModelSpec
    config: Any
    plan: ParallelPlan
    model: nn.Module
    """Whole, on meta."""
    layout: Layout
    number: int
    """Of this rank in the world."""
    batches: Sequence[Microbatch]
    device: str
    forwards: int
    """How often a block's forward runs for a microbatch."""
    weights: dict[str, Weight]
    """This rank's, by name; those that are tied once."""
    blocks: list[str]
    """Of this rank."""
    is_first: bool = True
    """Whether this rank looks tokens up."""
    is_last: bool = True
    """Whether this rank has the loss."""
    pipelined: bool = False
    """Whether microbatches overlap, so that backward of one does not follow its own forward."""
    splits: bool = False
    """Whether gradients of weights come long after those of inputs, so that they are summed at the end of the step."""
    repeated: frozenset[str] = frozenset()
    """Weights that another rank counts in the gradient norm."""
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    """Called once every adapter has had its turn."""
    flows: list[Flow] = field(default_factory=list)

    def add(self, kind: Kind, axis: str, what: str, payload: int, *, messages: int = 1) -> None:
        """So many messages with so many bytes in all; nothing where there is nobody to send to."""
        if self.size(axis) > 1 and messages:
            self.flows.append(Flow(kind=kind, axis=axis, what=what, messages=messages, payload=payload))

    def size(self, axis: str) -> int:
        """How many ranks a group of an axis has."""
        degrees = self.degrees
        if axis in EVERY_AXIS:
            return degrees[axis]
        fsdp = degrees.dp_shard * degrees.cp
        return {
            "fsdp": fsdp,
            "efsdp": fsdp // degrees.ep,
            "ddp": fsdp * degrees.dp_replicate,
            "eddp": fsdp * degrees.dp_replicate // degrees.ep,
            "world": degrees.world_size,
        }[axis]

    def rank(self, axis: str) -> int:
        """This rank's place on an axis."""
        return coordinates(self.degrees, self.number)[axis]

    def ranks(self, axis: str) -> tuple[int, ...]:
        """The ranks of this one's group of an axis."""
        return next(tuple(group) for group in groups(self.degrees, axis) if self.number in group)

    def tokens(self, batch: Microbatch) -> int:
        """Of a microbatch, those that this rank of `cp` has."""
        return -(-batch.mask.length // self.degrees.cp) if batch.tokens is None else batch.tokens

    def loss_rows(self, batch: Microbatch) -> int:
        """Tokens that the loss looks at: on a CPU those with a label, elsewhere all, for nobody waits to know which."""
        return self.tokens(batch) if batch.trained is None or self.device != "cpu" else batch.trained

    def copies(self, batch: Microbatch, blocks: int) -> Sequence[tuple[int, int]]:
        """Of each of so many blocks, copies of a microbatch's tokens that go to other ranks of `ep` and come from them.

        Without a record, those of routers that send every expert as many, and of padding none.
        """
        if batch.copies is not None:
            return batch.copies
        shared = self.size("tp") if self.layout.settings.sequence_parallel else 1
        real = sum(stop - start for start, stop in batch.mask.documents) / max(1, batch.mask.length)
        every = self.experts.per_token * round(self.tokens(batch) * real) // shared if self.experts is not None else 0
        elsewhere = round(every * (self.size("ep") - 1) / self.size("ep"))
        return [(elsewhere, elsewhere)] * blocks

    @property
    def degrees(self) -> Degrees:
        """Of the layout."""
        return self.layout.degrees

    @property
    def experts(self) -> ExpertShape | None:
        """Of the model, if it has any."""
        return self.spec.experts(self.config)

    @property
    def value_bytes(self) -> int:
        """Of a number that is computed with."""
        return dtype_bytes(self.layout.dtype)

    @property
    def exact_bytes(self) -> int:
        """Of a loss, and of whatever is summed in fp32 or better."""
        return max(4, self.value_bytes)

    @property
    def master_bytes(self) -> int:
        """Of a weight as it is kept, and of its gradient as it is summed."""
        return dtype_bytes(self.layout.master_dtype)

    def within(self, modules: Iterable[str]) -> list[str]:
        """Names of this rank's weights that lie in some modules."""
        prefixes = tuple(f"{module}." for module in modules)
        return [name for name in self.weights if name.startswith(prefixes)]

    def found(self, globs: Iterable[str]) -> list[str]:
        """Modules of the whole model that globs match."""
        return [name for glob in globs for name in find_modules(self.model, glob)]

    def here(self, modules: Iterable[str]) -> list[str]:
        """Those modules that lie in this rank's blocks."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return [name for name in modules if name.startswith(prefixes)]

    def totals(self) -> dict[tuple[Kind, str], Total]:
        """Flows added up by kind and axis."""
        found: dict[tuple[Kind, str], Total] = {}
        for flow in self.flows:
            key = flow.kind, flow.axis
            found[key] = found.get(key, Total()).plus(flow.messages, flow.payload)
        return found


_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def dtype_bytes(dtype: str) -> int:
    """Of one number of a type."""
    return _BYTES[dtype]
