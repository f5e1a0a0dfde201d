"""What a plugin returns is looked at where zoo receives it: a function for each kind of answer.

A wrong answer is a PluginError of one line: whose it is, which method gave it, what came, what the contract says.
Answers of models are in `model/answers`, tensors of kernels and schemes in `attention/answers`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.core.contracts.checkpoints import Converter, HubCheckpoint
from zoo.core.contracts.data import DataSource, Record, Remark, Sample
from zoo.core.contracts.entries import ParallelAdapterEntry
from zoo.core.contracts.models import ModelConfig
from zoo.core.contracts.parallel import MemoryPolicy, ParallelAdapter, Phase
from zoo.core.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from zoo.core.contracts.batch import Batch
    from zoo.core.registry.loading import PluginStatus

_LONGEST = 80


def wrong(who: str, method: str, came: str, says: str, *, verb: str = "returned") -> PluginError:
    """Return the error for a wrong answer of a method."""
    return PluginError(f"{who}: {method} {verb} {came}, and the contract says {says}; correct the plugin")


def shown(value: object) -> str:
    """Return a few words on any value: plain ones as they are, tensors by type, shape and device, others by type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device.type}"
    if value is None or isinstance(value, bool | int | float | str | Path):
        return f"{value!r:.{_LONGEST}}"
    if isinstance(value, tuple | list):
        said = f"{type(value).__name__} of {len(value)}"
        return f"a {said} ({', '.join(shown(one) for one in value[:3])})" if len(value) <= 3 else f"a {said}"
    return "a generator" if inspect.isgenerator(value) else f"an object of type {type(value).__name__}"


def is_count(value: object) -> bool:
    """Return whether a value is an int that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Objects ------------------------------------------------------------------------------------------


def checked_tracker(name: str, found: Any) -> Any:
    """Return what the target of a tracker gave for a run directory."""
    if not all(callable(getattr(found, method, None)) for method in ("log", "close")):
        raise wrong(f"tracker '{name}'", "its target", shown(found), "an object with log and close")
    return found


def refusal(who: str, method: str, answer: object) -> str | None:
    """Return why something cannot be, None if it can: what `supports` and `check` answer."""
    if answer is None or (isinstance(answer, str) and answer.strip()):
        return answer
    raise wrong(who, method, shown(answer), "None if it can, otherwise a sentence saying why not")


# Adapters and policies ----------------------------------------------------------------------------


def applies(adapter: ParallelAdapter, answer: object) -> bool:
    """Return the answer of an adapter's `applies`."""
    if not isinstance(answer, bool):
        raise wrong(adapter_named(adapter), "applies", shown(answer), "True or False")
    return answer


def changed(who: str, answer: object) -> nn.Module:
    """Return the model that `apply` of an adapter or a policy gives back."""
    if not isinstance(answer, nn.Module):
        raise wrong(who, "apply", shown(answer), "the model, changed in place or wrapped")
    return answer


def whole_parts(adapter: Any, answer: object) -> frozenset[Any]:
    """Return what an adapter's `whole` names."""
    known = ("weights", "gradients", "optimizer")
    if not isinstance(answer, Sequence | Set) or isinstance(answer, str) or not set(answer) <= set(known):
        said = answer if not isinstance(answer, Sequence | Set) else ", ".join(map(str, answer))
        raise wrong(adapter_named(adapter), "whole", shown(said), f"a collection of {', '.join(known)}")
    return frozenset(answer)


def check_batch(adapter: ParallelAdapter, before: Batch, after: object) -> None:
    """Compare what `shard_batch` made of a batch with what every later adapter and the model need."""
    who, says = adapter_named(adapter), "a Batch with tokens, labels and positions [1, T] int64 on the host"
    if type(after) is not type(before):
        raise wrong(who, "shard_batch", shown(after), says)
    for field in ("tokens", "labels", "positions"):
        old, new = getattr(before, field), getattr(after, field)
        fits = isinstance(new, Tensor) and (new.ndim, new.dtype, new.device) == (2, old.dtype, old.device)
        if not fits or new.shape != after.tokens.shape:
            raise wrong(who, "shard_batch", f"{field} {shown(new)}", says)


def check_adapter(adapter: Any, entries: Iterable[ParallelAdapterEntry]) -> None:
    """Compare the attributes of an adapter with what its entry says."""
    axes = {entry.name: entry.axes for entry in entries}
    who, entry = adapter_named(adapter), axes[adapter.name]
    if not isinstance(adapter.axes, tuple) or set(adapter.axes) != set(entry):
        raise wrong(who, "its axes", shown(adapter.axes), f"those of its entry, {shown(entry)}", verb="is")
    if not isinstance(adapter.phase, Phase):
        raise wrong(who, "its phase", shown(adapter.phase), "one of Phase", verb="is")


def check_order(adapter: Any, answer: Any) -> Any:
    """Return the order of forward and backward that an adapter gives."""
    methods = ("run", "repeated", "whole_norm")
    if not all(callable(getattr(answer, method, None)) for method in methods):
        raise wrong(adapter_named(adapter), "forward_backward", shown(answer), f"an object with {', '.join(methods)}")
    return answer


def adapter_named(adapter: Any) -> str:
    """Return what errors call an adapter."""
    return f"parallel adapter '{getattr(adapter, 'name', type(adapter).__name__)}'"


def saved_bytes(policy: MemoryPolicy, config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
    """Ask a memory policy what it keeps."""
    answer = policy.saved_bytes(config, tokens, bytes_per_value)
    if not is_count(answer):
        raise wrong(f"memory policy '{policy.name}'", "saved_bytes", shown(answer), "bytes, an int that is at least 0")
    return answer


# Hooks --------------------------------------------------------------------------------------------


def check_fields(by: PluginStatus | None, fields: Mapping[Any, Any], known: Collection[str]) -> None:
    """Compare the fields that `zoo_rope_for_length` changes with those that a family's config.json has."""
    for field in fields:
        if field not in known:
            near = did_you_mean(str(field), known) or f"fields: {', '.join(sorted(known))}"
            raise wrong(
                f"plugin {by.label if by else '?'}",
                "zoo_rope_for_length",
                f"the field {shown(field)}",
                f"fields of the family's config.json ({near})",
            )


# Checkpoints --------------------------------------------------------------------------------------


def located(converter: Converter, source: str) -> Path | None:
    """Ask a converter where a checkpoint lies."""
    answer = converter.locate(source)
    if answer is not None and not isinstance(answer, Path):
        raise wrong(_form(converter), "locate", shown(answer), "a Path, or None if it is not of this form")
    return answer


def opened(converter: Converter, path: Path) -> HubCheckpoint:
    """Let a converter open a checkpoint. The first tensor stands for all in what its source says."""
    answer, who = converter.open(path), _form(converter)
    if not isinstance(answer, HubCheckpoint) or not isinstance(answer.config, Mapping):
        raise wrong(who, "open", shown(answer), "a HubCheckpoint whose config has the fields of config.json")
    tensors = answer.tensors
    methods = ("names", "shape", "dtype", "read", "fingerprint")
    missing = next((method for method in methods if not callable(getattr(tensors, method, None))), None)
    if missing is not None:
        raise wrong(who, "open", f"tensors, {shown(tensors)} without {missing}", "a TensorSource")
    names = tensors.names()
    if not isinstance(names, Collection) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise wrong(who, "open", f"tensors whose names() are {shown(names)}", "a collection of names")
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise wrong(who, "open", f"tensors whose names() have {twice!r} twice", "each name once")
    for name in list(names)[:1]:
        _check_tensor(who, name, tensors.shape(name), tensors.dtype(name))
    return answer


def _check_tensor(who: str, name: str, shape: object, dtype: object) -> None:
    if not isinstance(shape, tuple | list) or not all(map(is_count, shape)):
        raise wrong(who, "open", f"tensors whose shape({name!r}) is {shown(shape)}", "a tuple of ints")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise wrong(who, "open", f"tensors whose dtype({name!r}) is {shown(dtype)}", "torch's name, as 'bfloat16'")


def _form(converter: Converter) -> str:
    return f"checkpoint format '{converter.name}'"


# Data ---------------------------------------------------------------------------------------------


def check_source(by: PluginStatus | None, source: Any) -> None:
    """Look at the corpus that `zoo_open_data` opened."""
    who = f"plugin {by.label if by else '?'}"
    missing = next((m for m in ("shards", "read") if not callable(getattr(source, m, None))), None)
    if missing is not None:
        raise wrong(who, "zoo_open_data", f"{shown(source)} without {missing}", "a DataSource, or None")
    if not isinstance(source.fingerprint, str):
        raise wrong(who, "zoo_open_data", f"a fingerprint {shown(source.fingerprint)}", "a text")
    shards = source.shards()
    if not isinstance(shards, list | tuple) or not all(isinstance(shard, str) for shard in shards):
        raise wrong(who, "zoo_open_data", f"a source whose shards() are {shown(shards)}", "a list of names")


def check_record(source: DataSource, start: int, answer: object) -> None:
    """Look at the first thing that `read` of a corpus gives from an offset on."""
    says = "pairs of a Record, whose fields are a mapping, and the next offset"
    who = f"data source {type(source).__name__}"
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Record):
        raise wrong(who, "read", shown(answer), says)
    record, offset = answer
    if not isinstance(record.fields, Mapping):
        raise wrong(who, "read", f"a Record with fields {shown(record.fields)}", says)
    if not is_count(offset) or offset == start:
        raise wrong(who, "read", f"the offset {shown(offset)} after {start}", says)


def sample_arrays(
    name: str, record: Record, sample: object, vocab_size: int
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Return token ids and what is trained of a data format's sample.

    Every sample is looked at: another record may take another way through a format. It is on the host anyhow.
    """
    who, at = f"data format '{name}'", f" for {record.where}"
    if not isinstance(sample, Sample):
        raise wrong(who, "it", f"{shown(sample)}{at}", "a Sample")
    tokens, trained = _array(sample.tokens), _array(sample.trained)
    if tokens is None or (tokens.size and tokens.dtype.kind not in "iu"):
        raise wrong(who, "it", f"tokens {_values(sample.tokens)}{at}", "a sequence of ints")
    marks = trained is not None and (not trained.size or trained.dtype.kind == "b" or _is_binary(trained))
    if trained is None or not marks:
        raise wrong(who, "it", f"trained {_values(sample.trained)}{at}", "a sequence of bools")
    if len(tokens) != len(trained):
        raise wrong(who, "it", f"{len(tokens)} tokens and {len(trained)} marks of what is trained{at}", "one a token")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        beyond = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise wrong(who, "it", f"token id {beyond}{at}", f"ids of the vocabulary, 0 to {vocab_size - 1}")
    if not isinstance(sample.remarks, Sequence) or not all(isinstance(one, Remark) for one in sample.remarks):
        raise wrong(who, "it", f"remarks {shown(sample.remarks)}{at}", "a sequence of Remarks")
    return tokens.astype(np.int32), trained.astype(np.bool_)


def _array(values: object) -> np.ndarray[Any, Any] | None:
    """Return a flat sequence as an array; None for anything else."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray | Tensor):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.ndim == 1 else None


def _is_binary(array: np.ndarray[Any, Any]) -> bool:
    """Return whether marks are written as 0 and 1."""
    return array.dtype.kind in "iu" and bool(((array == 0) | (array == 1)).all())


def _values(values: object) -> str:
    return f"[{', '.join(map(shown, values[:3]))}, ...]" if isinstance(values, list) else shown(values)


def number(who: str, method: str, answer: object, says: str) -> float:
    """Return a finite number that is not negative."""
    plain = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not plain or not math.isfinite(answer) or answer < 0:  # type: ignore[arg-type, operator]
        raise wrong(who, method, shown(answer), says)
    return float(answer)  # type: ignore[arg-type]
