"""The hooks of zoo: registration hooks return entries, decision hooks a choice or None, observers nothing.

A plugin module imports without torch. No hook is called inside a training step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from zoo.core.contracts.attention import AttentionProblem, Forecast
    from zoo.core.contracts.data import DataSource
    from zoo.core.contracts.entries import (
        AttentionEntry,
        CommandEntry,
        ContextSchemeEntry,
        ConverterEntry,
        DataFormatEntry,
        MemoryPolicyEntry,
        ModelEntry,
        ParallelAdapterEntry,
        TrackerEntry,
    )
    from zoo.core.contracts.layout import Layout
    from zoo.core.contracts.run import RunInfo

hookspec = pluggy.HookspecMarker("zoo")
hookimpl = pluggy.HookimplMarker("zoo")
"""Marks a function of a plugin as one of its hooks."""


# Registration -------------------------------------------------------------------------------------


@hookspec
def zoo_register_models() -> Sequence[ModelEntry]:  # type: ignore[empty-body]
    """Return the model families this plugin adds."""


@hookspec
def zoo_register_attention() -> Sequence[AttentionEntry]:  # type: ignore[empty-body]
    """Return the attention backends this plugin adds."""


@hookspec
def zoo_register_context_schemes() -> Sequence[ContextSchemeEntry]:  # type: ignore[empty-body]
    """Return the context schemes this plugin adds."""


@hookspec
def zoo_register_parallel_adapters() -> Sequence[ParallelAdapterEntry]:  # type: ignore[empty-body]
    """Return the parallel adapters this plugin adds."""


@hookspec
def zoo_register_memory_policies() -> Sequence[MemoryPolicyEntry]:  # type: ignore[empty-body]
    """Return the memory policies this plugin adds."""


@hookspec
def zoo_register_converters() -> Sequence[ConverterEntry]:  # type: ignore[empty-body]
    """Return the checkpoint formats this plugin reads and writes."""


@hookspec
def zoo_register_data_formats() -> Sequence[DataFormatEntry]:  # type: ignore[empty-body]
    """Return the sample formats this plugin understands."""


@hookspec
def zoo_register_trackers() -> Sequence[TrackerEntry]:  # type: ignore[empty-body]
    """Return the metrics sinks this plugin adds, for `--track NAME`."""


@hookspec
def zoo_register_commands() -> Sequence[CommandEntry]:  # type: ignore[empty-body]
    """Return the commands this plugin adds to `zoo`. Names of core commands cannot be taken."""


# Decisions: the first answer that is not None is taken; built-ins answer last ----------------------


@hookspec(firstresult=True)
def zoo_select_attention(problem: AttentionProblem, candidates: Sequence[str]) -> str | None:
    """Choose among the backends that support the problem, for `--attn auto`."""


@hookspec(firstresult=True)
def zoo_select_context_scheme(layout: Layout, window: int | None, candidates: Mapping[str, Forecast]) -> str | None:
    """Choose for layers with a sliding window (or none) among the schemes that can, for `--cp-scheme auto`."""


@hookspec(firstresult=True)
def zoo_select_memory_policy(
    saved_bytes: Mapping[str, int], budget_bytes: int, candidates: Sequence[str]
) -> str | None:
    """Choose a policy, for `--memory auto`, from the activation bytes each would keep on a rank."""


@hookspec(firstresult=True)
def zoo_match_checkpoint(config: Mapping[str, Any]) -> str | None:
    """Name the family of a checkpoint by its config.json."""


@hookspec(firstresult=True)
def zoo_rope_for_length(model: str, config: Mapping[str, Any], seq: int) -> Mapping[str, Any] | None:
    """Return the config.json fields to change so that a model made for shorter rows takes rows of `seq` tokens."""


@hookspec(firstresult=True)
def zoo_detect_data_format(columns: Collection[str]) -> str | None:
    """Name the format of a record with these columns."""


@hookspec(firstresult=True)
def zoo_open_data(uri: str) -> DataSource | None:
    """Open `--data URI`: a file, a directory, a glob, or a scheme of this plugin's own."""


# Everyone's word counts ---------------------------------------------------------------------------


@hookspec
def zoo_check_layout(layout: Layout) -> str | None:
    """Return a sentence saying why this layout must not run, or None. Any plugin may object."""


# Observers: called on rank 0, between steps; an exception disables the observer, not the run --------


@hookspec
def zoo_run_start(run: RunInfo) -> None:
    """A run is set up and its first step comes next."""


@hookspec
def zoo_step_end(run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics of a logged step are known; without `loss` and `grad_norm` if no token of it was trained."""


@hookspec
def zoo_checkpoint_saved(run: RunInfo, step: int, path: str) -> None:
    """A checkpoint is finished and will be resumed from."""


@hookspec
def zoo_run_error(run: RunInfo, error: BaseException) -> None:
    """The run ends by an error."""


@hookspec
def zoo_run_end(run: RunInfo, status: str) -> None:
    """The run ends: `done`, or `saved` when asked to stop."""
