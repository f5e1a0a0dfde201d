"""A model zoo for long-context fine-tuning: everything that users and authors of plugins need.

Names are imported when they are first used, so `import zoo` costs nothing. These, `zoo.models.common` and `zoo.testing`
are public; every other module is private (docs/stability.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.public_names import Groups, lazy_getattr, modules_of
from zoo.version import __version__ as __version__

if TYPE_CHECKING:
    from zoo.core.api import (
        finetune as finetune,
        load as load,
        plan as plan,
    )
    from zoo.core.attention.kernel import RectangleBackend as RectangleBackend
    from zoo.core.attention.needs import Need as Need, remote_needs as remote_needs
    from zoo.core.attention.slices import local_slices as local_slices, remote_slices as remote_slices
    from zoo.core.contracts.account import Account as Account
    from zoo.core.contracts.attention import (
        AttentionBackend as AttentionBackend,
        AttentionProblem as AttentionProblem,
        AttentionSlice as AttentionSlice,
        ContextPlan as ContextPlan,
        ContextScheme as ContextScheme,
        Forecast as Forecast,
        HeadShape as HeadShape,
        Link as Link,
        SliceRule as SliceRule,
        Stage as Stage,
    )
    from zoo.core.contracts.batch import IGNORE as IGNORE, PADDING as PADDING, Batch as Batch
    from zoo.core.contracts.checkpoints import Converter as Converter, HubCheckpoint as HubCheckpoint
    from zoo.core.contracts.data import (
        DataFormat as DataFormat,
        DataSource as DataSource,
        Record as Record,
        Remark as Remark,
        Sample as Sample,
    )
    from zoo.core.contracts.entries import (
        AttentionEntry as AttentionEntry,
        CommandEntry as CommandEntry,
        ContextSchemeEntry as ContextSchemeEntry,
        ConverterEntry as ConverterEntry,
        DataFormatEntry as DataFormatEntry,
        MemoryPolicyEntry as MemoryPolicyEntry,
        ModelEntry as ModelEntry,
        ParallelAdapterEntry as ParallelAdapterEntry,
        TrackerEntry as TrackerEntry,
    )
    from zoo.core.contracts.globs import find_modules as find_modules
    from zoo.core.contracts.layout import Layout as Layout, ModelFacts as ModelFacts
    from zoo.core.contracts.models import (
        BlockShape as BlockShape,
        ExpertShape as ExpertShape,
        Losses as Losses,
        ModelConfig as ModelConfig,
        ModelSpec as ModelSpec,
        ParallelPlan as ParallelPlan,
        SeamName as SeamName,
        TensorStyle as TensorStyle,
    )
    from zoo.core.contracts.parallel import (
        Counts as Counts,
        ForwardBackward as ForwardBackward,
        MemoryPolicy as MemoryPolicy,
        ParallelAdapter as ParallelAdapter,
        Phase as Phase,
        StatePart as StatePart,
        Sums as Sums,
    )
    from zoo.core.contracts.run import RunInfo as RunInfo, Tracker as Tracker
    from zoo.core.contracts.values import ModelValues as ModelValues, Values as Values
    from zoo.core.contracts.weights import Piece as Piece, Rule as Rule, TensorSource as TensorSource
    from zoo.core.errors import (
        DataError as DataError,
        FitError as FitError,
        LayoutError as LayoutError,
        NumericsError as NumericsError,
        PluginError as PluginError,
        SavedOnSignal as SavedOnSignal,
        UsageError as UsageError,
        ZooError as ZooError,
    )
    from zoo.core.job.job import LayoutSection as LayoutSection
    from zoo.core.launch.launcher import WorkerDied as WorkerDied
    from zoo.core.mesh.degrees import Degrees as Degrees
    from zoo.core.mesh.mesh import Mesh as Mesh
    from zoo.core.model.routing import RouterStats as RouterStats, Routing as Routing
    from zoo.core.model.rules import Concat as Concat, Part as Part, Rename as Rename, Stack as Stack
    from zoo.core.model.seams import replace_modules as replace_modules
    from zoo.core.registry.decisions import Registry as Registry
    from zoo.core.registry.hookspecs import hookimpl as hookimpl
    from zoo.core.registry.loading import Plugins as Plugins
    from zoo.core.sequence.layout import SequenceLayout as SequenceLayout
    from zoo.core.sequence.mask import Mask as Mask
    from zoo.core.storage.checksums import Checksums as Checksums
    from zoo.core.tokenizer.tokenizer import Tokenizer as Tokenizer

_GROUPS: Groups = {
    "For users": {
        "zoo.core.api": (
            "finetune",
            "load",
            "plan",
        ),
    },
    "Hooks": {
        "zoo.core.registry.decisions": ("Registry",),
        "zoo.core.registry.hookspecs": ("hookimpl",),
        "zoo.core.registry.loading": ("Plugins",),
    },
    "Entries": {
        "zoo.core.contracts.entries": (
            "AttentionEntry",
            "CommandEntry",
            "ContextSchemeEntry",
            "ConverterEntry",
            "DataFormatEntry",
            "MemoryPolicyEntry",
            "ModelEntry",
            "ParallelAdapterEntry",
            "TrackerEntry",
        ),
    },
    "Attention": {
        "zoo.core.attention.kernel": ("RectangleBackend",),
        "zoo.core.contracts.attention": (
            "AttentionBackend",
            "AttentionProblem",
            "AttentionSlice",
            "HeadShape",
            "SliceRule",
        ),
        "zoo.core.sequence.mask": ("Mask",),
    },
    "Context schemes": {
        "zoo.core.attention.needs": (
            "Need",
            "remote_needs",
        ),
        "zoo.core.attention.slices": (
            "local_slices",
            "remote_slices",
        ),
        "zoo.core.contracts.attention": (
            "ContextPlan",
            "ContextScheme",
            "Forecast",
            "Link",
            "Stage",
        ),
        "zoo.core.sequence.layout": ("SequenceLayout",),
    },
    "Parallel layouts": {
        "zoo.core.contracts.account": ("Account",),
        "zoo.core.contracts.batch": ("Batch",),
        "zoo.core.contracts.globs": ("find_modules",),
        "zoo.core.contracts.layout": (
            "Layout",
            "ModelFacts",
        ),
        "zoo.core.contracts.models": ("BlockShape",),
        "zoo.core.contracts.parallel": (
            "Counts",
            "ForwardBackward",
            "ParallelAdapter",
            "Phase",
            "StatePart",
            "Sums",
        ),
        "zoo.core.contracts.values": (
            "ModelValues",
            "Values",
        ),
        "zoo.core.job.job": ("LayoutSection",),
        "zoo.core.mesh.degrees": ("Degrees",),
        "zoo.core.mesh.mesh": ("Mesh",),
        "zoo.core.model.seams": ("replace_modules",),
    },
    "Models": {
        "zoo.core.contracts.batch": (
            "IGNORE",
            "PADDING",
        ),
        "zoo.core.contracts.models": (
            "ExpertShape",
            "Losses",
            "ModelConfig",
            "ModelSpec",
            "ParallelPlan",
            "SeamName",
            "TensorStyle",
        ),
        "zoo.core.contracts.weights": (
            "Piece",
            "Rule",
        ),
        "zoo.core.model.routing": (
            "RouterStats",
            "Routing",
        ),
        "zoo.core.model.rules": (
            "Concat",
            "Part",
            "Rename",
            "Stack",
        ),
    },
    "Memory": {
        "zoo.core.contracts.parallel": ("MemoryPolicy",),
    },
    "Data": {
        "zoo.core.contracts.data": (
            "DataFormat",
            "DataSource",
            "Record",
            "Remark",
            "Sample",
        ),
        "zoo.core.tokenizer.tokenizer": ("Tokenizer",),
    },
    "Tracking and runs": {
        "zoo.core.contracts.run": (
            "RunInfo",
            "Tracker",
        ),
    },
    "Conversion": {
        "zoo.core.contracts.checkpoints": (
            "Converter",
            "HubCheckpoint",
        ),
        "zoo.core.contracts.weights": ("TensorSource",),
        "zoo.core.storage.checksums": ("Checksums",),
    },
    "Errors": {
        "zoo.core.errors": (
            "DataError",
            "FitError",
            "LayoutError",
            "NumericsError",
            "PluginError",
            "SavedOnSignal",
            "UsageError",
            "ZooError",
        ),
        "zoo.core.launch.launcher": ("WorkerDied",),
    },
}
"""Every public name, once. docs/api.md is written from it, and the imports above repeat it for type checkers."""

_RENAMED: dict[str, str] = {}
"""Deprecated name to its new spelling, as `{"OldMask": "zoo.Mask"}`; it stays here for one release."""

# A type checker would take every name that it does not know for `Any`.
if not TYPE_CHECKING:
    __all__ = ["__version__", *modules_of(_GROUPS)]
    __getattr__ = lazy_getattr(__name__, _GROUPS, _RENAMED)

    def __dir__() -> list[str]:
        return sorted(__all__)
