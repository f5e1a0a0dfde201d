"""A job: every setting of a run in sections, merged strictly from defaults, recipe, file, `--set` and flags."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Union

from zoo.core.errors import UsageError, did_you_mean
from zoo.core.humanize import parse_tokens
from zoo.core.job.ranges import COUNT, DEGREE, Span, degree, number

Settings = Mapping[str, tuple[Any, str]]
"""Dotted key to value, and where it was said, for error messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """What is trained. Any other key in this section is a field of the model's own config.json."""

    name: str = ""
    size: str | None = None
    source: str | None = field(default=None, metadata={"key": "from"})
    """Hub id or directory; `scratch` for random weights."""
    dtype: str = "auto"
    """Type of the arithmetic: float32, bfloat16 or float64. Weights and optimizer state are never below float32."""
    deterministic: bool = False
    """Sums in a fixed order everywhere, so that the same run twice is the same bit for bit, at some cost in speed."""
    overrides: Mapping[str, Any] = field(default_factory=dict, metadata={"key": None})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """What it is trained on."""

    path: str | None = None
    seq: int = field(default=0, metadata={"tokens": True, "span": Span(0, 2**30)})
    """Global length of a row, in tokens."""
    global_batch: int | None = number(None, COUNT)
    """Rows an optimizer step sees; the least the layout allows if unset."""
    micro_batch: int = number(1, COUNT)
    """Rows a rank's forward sees at once."""
    format: str | None = None
    overlong: str | None = None
    loss_on: str = "assistant"
    chat_template: str | None = None
    seed: int = number(0, Span(0, 2**32 - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSection:
    """AdamW and clipping."""

    lr: float = number(2e-5, Span(0, 1e38), usual=Span(1e-8, 0.1))
    beta1: float = number(0.9, Span(0, 1, below=True))
    beta2: float = number(0.95, Span(0, 1, below=True))
    eps: float = number(1e-8, Span(0, 1, above=True), usual=Span(1e-20, 1e-3))
    weight_decay: float = number(0.1, Span(0, 100), usual=Span(0, 1))
    clip: float = number(1.0, Span(0, 1e12))
    """Largest gradient norm; 0 never clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSection:
    """How long, and how the learning rate moves."""

    steps: int = number(1000, COUNT)
    warmup: int | None = number(None, Span(0, 10**9))
    """Steps of linear warm-up; 3 % of the steps if unset."""
    decay: str = "cosine"
    """cosine, linear or constant."""
    final: float = number(0.1, Span(0, 1))
    """Share of the learning rate left at the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSection:
    """Degrees of the mesh axes: 1 if unset, but dp_shard fills the machine."""

    pp: int | None = degree()
    dp_replicate: int | None = degree()
    dp_shard: int | None = degree()
    cp: int | None = degree()
    tp: int | None = degree()
    ep: int | None = degree()
    degrees: str | None = None
    """auto: those that are unset are chosen for the model, the rows and the machine."""
    data_parallel: str = "auto"
    """How weights live over dp_replicate x dp_shard x cp: fsdp, zero1, ddp; auto is fsdp."""
    reshard: bool = True
    """Under fsdp, whether a block's weights are given up after its forward and gathered again for its backward."""
    prefetch: int = number(1, Span(1, 64))
    """Under fsdp, how many blocks ahead weights are gathered: more hides slower links, and takes memory."""
    cp_scheme: str = "auto"
    """A scheme for all layers, or two, `ring,halo`: for layers without a sliding window and for those with one."""
    cp_balance: str = "auto"
    """How rows are cut: head-tail, balanced (equal tokens and scores), contiguous; auto takes what suits the row."""
    cp_wire: str | None = None
    """Type in which K/V and their gradients travel between ranks, if narrower than their own: bfloat16."""
    pp_schedule: str = "1f1b"
    """Order of forward and backward over microbatches and stages: 1f1b, gpipe, interleaved, zero-bubble, zbv."""
    pp_virtual: int | None = degree()
    """Stages a rank; as few as the schedule needs if unset."""
    timeout: float | None = number(None, Span(0, 10**7, above=True), usual=Span(10, 10**7))
    """Seconds a step with its save may take before a rank counts as hung, half an hour if unset. A part of the start
    (imports, joining, weights, first data) may take as long, and never less than half an hour."""
    sequence_parallel: bool = True
    """With tp: norms and the residual are cut on tokens over its ranks."""
    overlap_tensor: bool = False
    """With tp on CUDA: matrix products go in pieces beside their messages, by torch's symmetric memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSection:
    """Which kernel, and what a token sees of its document."""

    backend: str = "auto"
    mask: str = "causal"
    """causal; prefix: the tokens before the first trained one see each other; full: everybody sees everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySection:
    """What a block keeps for backward."""

    policy: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    """Where the run lives and how it survives."""

    out: str | None = None
    every: int = number(100, COUNT)
    """Steps between saves; the last step is always saved."""
    keep: int = number(2, COUNT)
    background: bool = field(default=True, metadata={"key": "async"})
    """Whether the run goes on while a save is written; it holds for a copy to the host only."""
    resume: str = "auto"
    """auto, never, or the path of a run or of one of its checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSection:
    """How ranks are kept alive; changes nothing that is computed."""

    nproc: int | None = number(None, DEGREE)
    """Ranks to start on this machine; its accelerators, or what the degrees ask for, if unset."""
    max_restarts: int = number(0, Span(0, 10**6))
    """Times that ranks are started again, from the last finished checkpoint, after one died or hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """What is said."""

    every: int = number(1, COUNT)
    """Steps between reads of the device; metrics.jsonl has every step whatever this is."""
    track: tuple[str, ...] = ()
    peak_tflops: float | None = number(None, Span(0, 10**9, above=True))
    """Peak of one rank, for MFU; looked up or measured if unset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All settings of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    layout: LayoutSection = field(default_factory=LayoutSection)
    attention: AttentionSection = field(default_factory=AttentionSection)
    memory: MemorySection = field(default_factory=MemorySection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    log: LogSection = field(default_factory=LogSection)

    @classmethod
    def from_settings(cls, *layers: Settings) -> Job:
        """Merge layers, later ones winning. Raises UsageError."""
        merged: dict[str, tuple[Any, str]] = {}
        for layer in layers:
            merged.update(layer)
        sections: dict[str, dict[str, Any]] = {}
        overrides: dict[str, Any] = {}
        for key, (value, where) in merged.items():
            section, _, leaf = key.partition(".")
            target = _field(key, where)
            if target is None:
                overrides[leaf] = _number_or(value)
            else:
                sections.setdefault(section, {})[target.name] = _coerce(value, target, f"{key} ({where})")
        if overrides:
            sections.setdefault("model", {})["overrides"] = overrides
        return cls(**{f.name: _section_type(f.name)(**sections.get(f.name, {})) for f in fields(cls)})

    @classmethod
    def from_plain(cls, sections: Mapping[str, Mapping[str, Any]]) -> Job:
        """The inverse of `settings`."""
        return cls.from_settings({f"{s}.{k}": (v, "job") for s, part in sections.items() for k, v in part.items()})

    def settings(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, as written to config.yaml and read back by `-c`."""
        result: dict[str, dict[str, Any]] = {}
        for section in fields(self):
            part = getattr(self, section.name)
            values = {_key(f): _plain(getattr(part, f.name)) for f in fields(part) if _key(f) is not None}
            result[section.name] = {k: v for k, v in values.items() if v is not None}  # type: ignore[misc]
        result["model"].update(self.model.overrides)
        return result

    def unusual(self) -> list[str]:
        """Settings whose numbers are allowed and odd, each as a sentence."""
        found = []
        for section in fields(self):
            part = getattr(self, section.name)
            for target in fields(part):
                usual, value = target.metadata.get("usual"), getattr(part, target.name)
                if usual is not None and value is not None and value not in usual:
                    found.append(f"{section.name}.{_key(target)} is {value}, and usually {usual}")
        return found

    def replace(self, section: str, **values: Any) -> Job:
        """A copy with some values of a section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


@functools.cache
def texts() -> frozenset[str]:
    """Settings that are texts."""
    hints = {section: typing.get_type_hints(kind) for section, kind in typing.get_type_hints(Job).items()}
    return frozenset(
        f"{section.name}.{_key(f)}"
        for section in fields(Job)
        for f in fields(_section_type(section.name))
        if str in (hints[section.name][f.name], *typing.get_args(hints[section.name][f.name]))
    )


def _number_or(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no point) as text; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _section_type(name: str) -> Any:
    return typing.get_type_hints(Job)[name]


def _key(target: dataclasses.Field[Any]) -> str | None:
    key: str | None = target.metadata.get("key", target.name)
    return key


def _keys(section: str) -> Iterator[str]:
    return (key for f in fields(_section_type(section)) if (key := _key(f)) is not None)


def _field(key: str, where: str) -> dataclasses.Field[Any] | None:
    """The field a dotted key names; None for a field of the model's own config."""
    section, _, leaf = key.partition(".")
    known = [f.name for f in fields(Job)]
    if section not in known:
        raise UsageError(
            _said(
                f"unknown section '{section}' in {where};",
                did_you_mean(section, known),
                f"sections: {', '.join(known)}",
            )
        )
    for candidate in fields(_section_type(section)):
        if _key(candidate) == leaf:
            return candidate
    if section == "model":
        return None
    every = [f"{name}.{k}" for name in known for k in _keys(name)]
    raise UsageError(
        _said(
            f"unknown key '{key}' in {where};",
            did_you_mean(key, every),
            f"keys of {section}: {', '.join(_keys(section))}",
        )
    )


def _coerce(value: Any, target: dataclasses.Field[Any], where: str) -> Any:
    """A value as the field's type, or UsageError naming where it was said."""
    hints = typing.get_type_hints(_owner(target))
    kind = hints[target.name]
    if typing.get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if target.metadata.get("tokens"):
        found: Any = parse_tokens(value, name=where)
    elif typing.get_origin(kind) is tuple:
        found = _names(value, where)
    else:
        found = _READERS[kind](value, where)
    _check_span(found, target, where)
    return found


def _check_span(value: Any, target: dataclasses.Field[Any], where: str) -> None:
    span: Span | None = target.metadata.get("span")
    if span is None or value in span or (value < span.low and target.metadata.get("least_with_layout")):
        return
    raise UsageError(f"{where}: {value} is out of range; it is {span}")


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: '{value}' is not a list of names")
    return tuple(names)


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where}: '{value}' is not true or false")
    return value


def _whole_number(value: Any, where: str) -> int:
    """A whole number, also one written as 1e6; not by way of a float where it is one, which would round it."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return int(str(value)) if str(value).lstrip("+-").isdigit() else _integral(float(value))
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{where}: '{value}' is not a whole number") from None


def _integral(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def _any_number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{where}: '{value}' is not a number") from None


def _text(value: Any, where: str) -> str:
    if value is None or isinstance(value, list | dict):
        raise UsageError(f"{where}: '{value}' is not a text")
    return str(value)


_READERS = {bool: _switch, int: _whole_number, float: _any_number, str: _text}


def _owner(target: dataclasses.Field[Any]) -> Any:
    return next(t for t in typing.get_type_hints(Job).values() if any(f is target for f in fields(t)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _said(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
