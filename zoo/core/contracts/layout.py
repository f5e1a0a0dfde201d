"""One layout: how a run lies on its ranks, decided once on the host; and what it must know of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoo.core.contracts.attention import AttentionProblem, HeadShape
from zoo.core.contracts.models import BlockShape, ExpertShape
from zoo.core.contracts.values import ModelValues
from zoo.core.job.job import LayoutSection
from zoo.core.mesh.degrees import Degrees

if TYPE_CHECKING:
    from zoo.core.contracts.attention import ContextScheme


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a layout must know of a model: facts that its config alone decides."""

    name: str = ""
    """Of the family."""
    config: Any = None
    layer_heads: Sequence[HeadShape] = ()
    """The heads of each attention layer, whole."""
    layer_windows: Sequence[int | None] = ()
    """The sliding window of each attention layer; None is no window."""
    experts: ExpertShape | None = None
    """The model's experts, if it has any."""
    widths: Sequence[tuple[str, int]] = ()
    """Modules that the plan's `tensor` cuts, as globs, and the length of the dim that is cut."""
    style_objection: str | None = None
    """Why the plan's `tensor` contradicts the shapes of parameters, if it does."""
    unnamed_module: str | None = None
    """A module with parameters that the plan's `tensor` does not name, if there is one."""
    blocks: Sequence[BlockShape] = ()
    """What a pipeline must know of each block, in order."""
    last_values: int = 0
    """Values of the matrices that only the last stage of a pipeline needs."""
    values: ModelValues = field(default_factory=ModelValues)
    """How many values the parameters have, by what may cut them."""

    @cached_property
    def heads(self) -> Mapping[HeadShape, int]:
        """How many layers have which heads, the most frequent first."""
        return dict(Counter(self.layer_heads).most_common())

    @cached_property
    def windows(self) -> Mapping[int | None, int]:
        """How many layers have which sliding window."""
        return dict(Counter(self.layer_windows))

    def scores(self, seq: int) -> list[float]:
        """Return what a token's scores cost in each attention layer, beside a weight matrix.

        That is twice the width times the keys that it sees in a row that is one document.
        """
        keys = [seq / 2 if window is None else min(window, seq / 2) for window in self.layer_windows]
        return [2.0 * h.num_heads * h.head_dim * k for h, k in zip(self.layer_heads, keys, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run lies on its ranks. Adapters, schemes and plugins read it; nobody changes it."""

    seq: int
    """Length of a row in tokens, over all ranks that share it."""
    degrees: Degrees = field(default_factory=Degrees)
    settings: LayoutSection = field(default_factory=LayoutSection)
    """The job's section `layout`, with every choice made but the degrees and the context scheme."""
    micro_batch: int = 1
    """Rows that a rank's forward sees at once, one after another in one sequence."""
    microbatches: int = 1
    """Of a step, on each data-parallel rank."""
    dtype: str = "float32"
    """Type of the arithmetic."""
    device: str = "cpu"
    """torch device type: `cpu`, `cuda`."""
    deterministic: bool = False
    """Whether gradients must have the same bits each time."""
    keeps_weights_for_a_step: bool = False
    """What the data-parallel adapter says of itself."""
    schemes: Mapping[int | None, ContextScheme] = field(default_factory=dict)
    """The context scheme of layers by their window; empty without context parallelism."""
    model: ModelFacts = field(default_factory=ModelFacts)

    @property
    def master_dtype(self) -> str:
        """Type of the weights, of their gradients' sums and of the optimizer state: never below float32."""
        return "float32" if self.dtype in ("bfloat16", "float16") else self.dtype

    @property
    def global_batch(self) -> int:
        """Rows of a step."""
        return self.degrees.dp * self.micro_batch * self.microbatches

    @property
    def problems(self) -> tuple[AttentionProblem, ...]:
        """The attention of every kind of layer as a rank of `tp` holds it, the most frequent first."""
        return tuple(
            AttentionProblem(
                device=self.device,
                dtype=self.dtype,
                head_dim=heads.head_dim,
                num_heads=heads.num_heads,
                num_kv_heads=heads.num_kv_heads,
                deterministic=self.deterministic,
            )
            for heads in (whole.over(self.degrees.tp) for whole in self.model.heads)
        )
