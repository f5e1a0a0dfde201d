"""A model zoo for long-context fine-tuning: everything that users and authors of plugins need.

Names are imported when they are first used, so `import zoo` costs nothing. These, `zoo.models.common` and `zoo.testing`
are public; every other module is private (docs/stability.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.core.public_names import Groups, lazy_getattr, modules_of
from zoo.core.version import __version__ as __version__

if TYPE_CHECKING:
    from zoo.core.api import (
        finetune as finetune,
        load as load,
        plan as plan,
    )
    from zoo.core.attention.kernel import (
        RectangleBackend as RectangleBackend,
    )
    from zoo.core.attention.layout import (
        SequenceLayout as SequenceLayout,
    )
    from zoo.core.attention.mask import (
        Mask as Mask,
    )
    from zoo.core.attention.needs import (
        Need as Need,
        remote_needs as remote_needs,
    )
    from zoo.core.attention.problem import (
        AttentionProblem as AttentionProblem,
        HeadShape as HeadShape,
    )
    from zoo.core.attention.slices import (
        local_slices as local_slices,
        remote_slices as remote_slices,
    )
    from zoo.core.attention.wire import (
        Link as Link,
    )
    from zoo.core.batch import (
        Batch as Batch,
    )
    from zoo.core.checksums import (
        Checksums as Checksums,
    )
    from zoo.core.contracts import (
        IGNORE as IGNORE,
        PADDING as PADDING,
        AttentionBackend as AttentionBackend,
        AttentionSlice as AttentionSlice,
        ContextPlan as ContextPlan,
        ContextScheme as ContextScheme,
        Forecast as Forecast,
        MemoryPolicy as MemoryPolicy,
        ModelConfig as ModelConfig,
        ModelSpec as ModelSpec,
        ParallelAdapter as ParallelAdapter,
        Phase as Phase,
        SliceRule as SliceRule,
        Stage as Stage,
        StatePart as StatePart,
    )
    from zoo.core.degrees import (
        Degrees as Degrees,
    )
    from zoo.core.entries import (
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
    from zoo.core.forward_backward import (
        Counts as Counts,
        ForwardBackward as ForwardBackward,
        Sums as Sums,
    )
    from zoo.core.hookspecs import (
        hookimpl as hookimpl,
    )
    from zoo.core.job import (
        LayoutSection as LayoutSection,
    )
    from zoo.core.launch import (
        WorkerDied as WorkerDied,
    )
    from zoo.core.layout import (
        Layout as Layout,
        ModelFacts as ModelFacts,
    )
    from zoo.core.mesh import (
        Mesh as Mesh,
    )
    from zoo.core.plan import (
        BlockShape as BlockShape,
        ExpertShape as ExpertShape,
        Losses as Losses,
        ParallelPlan as ParallelPlan,
        SeamName as SeamName,
        TensorStyle as TensorStyle,
    )
    from zoo.core.plugins import (
        Plugins as Plugins,
    )
    from zoo.core.registry import (
        Registry as Registry,
    )
    from zoo.core.routing import (
        RouterStats as RouterStats,
        Routing as Routing,
    )
    from zoo.core.rules import (
        Concat as Concat,
        Part as Part,
        Piece as Piece,
        Rename as Rename,
        Rule as Rule,
        Stack as Stack,
    )
    from zoo.core.seams import (
        find_modules as find_modules,
        replace_modules as replace_modules,
    )
    from zoo.core.tokenizer import (
        Tokenizer as Tokenizer,
    )
    from zoo.core.traffic import (
        Account as Account,
    )
    from zoo.core.values import (
        ModelValues as ModelValues,
        Values as Values,
    )

_GROUPS: Groups = {
    "For users": {"zoo.core.api": ("finetune", "load", "plan")},
    "Hooks": {
        "zoo.core.hookspecs": ("hookimpl",),
        "zoo.core.plugins": ("Plugins",),
        "zoo.core.registry": ("Registry",),
    },
    "Entries": {
        "zoo.core.entries": (
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
        "zoo.core.attention.mask": ("Mask",),
        "zoo.core.attention.problem": ("AttentionProblem", "HeadShape"),
        "zoo.core.contracts": ("AttentionBackend", "AttentionSlice", "SliceRule"),
    },
    "Context schemes": {
        "zoo.core.attention.layout": ("SequenceLayout",),
        "zoo.core.attention.needs": ("Need", "remote_needs"),
        "zoo.core.attention.slices": ("local_slices", "remote_slices"),
        "zoo.core.attention.wire": ("Link",),
        "zoo.core.contracts": ("ContextPlan", "ContextScheme", "Forecast", "Stage"),
    },
    "Parallel layouts": {
        "zoo.core.batch": ("Batch",),
        "zoo.core.contracts": ("ParallelAdapter", "Phase", "StatePart"),
        "zoo.core.degrees": ("Degrees",),
        "zoo.core.forward_backward": ("Counts", "ForwardBackward", "Sums"),
        "zoo.core.job": ("LayoutSection",),
        "zoo.core.layout": ("Layout", "ModelFacts"),
        "zoo.core.mesh": ("Mesh",),
        "zoo.core.plan": ("BlockShape",),
        "zoo.core.seams": ("find_modules", "replace_modules"),
        "zoo.core.traffic": ("Account",),
        "zoo.core.values": ("ModelValues", "Values"),
    },
    "Models": {
        "zoo.core.contracts": ("IGNORE", "PADDING", "ModelConfig", "ModelSpec"),
        "zoo.core.plan": ("ExpertShape", "Losses", "ParallelPlan", "SeamName", "TensorStyle"),
        "zoo.core.routing": ("RouterStats", "Routing"),
        "zoo.core.rules": ("Concat", "Part", "Piece", "Rename", "Rule", "Stack"),
    },
    "Memory": {"zoo.core.contracts": ("MemoryPolicy",)},
    "Data": {
        "zoo.core.formats": ("DataFormat", "DataSource", "Record", "Remark", "Sample"),
        "zoo.core.tokenizer": ("Tokenizer",),
    },
    "Tracking and runs": {"zoo.core.formats": ("RunInfo", "Tracker")},
    "Conversion": {
        "zoo.core.checksums": ("Checksums",),
        "zoo.core.formats": ("Converter", "HubCheckpoint", "TensorSource"),
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
        "zoo.core.launch": ("WorkerDied",),
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
