"""Ranks are one job: what they hold is compared before it is used, and what one of them cannot do, none does.

Costs one exchange of digests, and one of the facts themselves where digests differ. Every function here is collective.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zoo.core.contracts.weights import TensorSource
from zoo.core.errors import PluginError, UsageError
from zoo.core.launch.collective import gathered, host_name, shared
from zoo.core.plan.prepared import Prepared
from zoo.core.registry.failures import plugins_named
from zoo.core.registry.loading import Plugins, differences
from zoo.core.storage import finished
from zoo.version import __version__

Facts = Mapping[str, Any]
"""What must be equal on all ranks, by the name an error gives it; JSON values."""

_PATHS = ("model.from", "data.path", "data.chat_template", "checkpoint.out", "checkpoint.resume")
"""May be spelt in another way on another host: what they lead to is compared."""
_OF_ONE_RANK = ("launch.nproc", "launch.max_restarts", "log.track", "log.peak_tflops")
"""Matter on rank 0 only, or not at all once ranks run."""
_SAMPLED_VALUES = 64
"""Of each tensor of a checkpoint that go into the digest of its weights."""
_SMALL_BYTES = 1 << 24
_SAID, _SHOWN = 4, 80
"""How many differences an error names, and how many characters of a value."""


def compare(facts: Facts | None, hint: str) -> None:
    """Raise UsageError on every rank if two ranks hold other facts. None takes no part: the rank does not need them."""
    digest = None if facts is None else hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gathered(digest)) - {None}) <= 1:
        return
    everyone = gathered((facts, host_name()))
    base, (expected, _host_of_base) = next((rank, said) for rank, said in enumerate(everyone) if said[0] is not None)
    for rank, (found, host) in enumerate(everyone):
        if found is not None and found != expected:
            raise UsageError(f"ranks of one job differ: {_differences(expected, found, base, rank, host)}. {hint}")


def same_plugins(plugins: Plugins) -> None:
    """Compare what every rank loaded, before anything depends on it. Raise PluginError."""
    everyone = gathered((plugins.fingerprint(), host_name(), plugins.resolved()))
    for rank, (fingerprint, host, resolved) in enumerate(everyone):
        if fingerprint != everyone[0][0]:
            what = "; ".join(differences(everyone[0][2], resolved))
            raise PluginError(
                f"rank {rank} (host {host}) loaded other plugins than rank 0: {what}. "
                f"Install the same environment on every host; compare `zoo plugins`"
            )


def agreed(make: Callable[[], Prepared], plugins: Plugins) -> Prepared:
    """Return the job that `make` prepares, once it is the same on all ranks: software, plugins, settings, and files.

    The run directory is made, and seen to be one. Raise what `make` raises, UsageError or PluginError, on all ranks.
    """
    if dist.get_world_size() == 1:
        prepared = make()
        _make(prepared.out)
        return prepared
    same_plugins(plugins)
    prepared = shared(make, named=plugins_named(plugins))
    compare(_settings(prepared), "Type the same command with the same software for every rank")
    shared_folder(prepared.out)
    compare(
        shared(lambda: {"weights": _weights(prepared), **_resumed(prepared)}),
        "Give every host the same files, or a file system that hosts share",
    )
    return prepared


def shared_folder(folder: Path) -> None:
    """Make a folder that all ranks see. Raise UsageError on all of them if some see another one.

    A host that makes a folder of its own would keep its share of every checkpoint to itself.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    shared(lambda: _make(folder))
    # A name that no host has looked for yet, so that no cache of a network file system says that it is not there.
    marker = folder / gathered(f".ranks-{uuid.uuid4().hex}")[0]
    shared(lambda: _leave(marker) if dist.get_rank() == 0 else None)
    everyone = gathered((marker.exists(), str(folder.absolute()), host_name()))
    if dist.get_rank() == 0:
        marker.unlink(missing_ok=True)
    if not everyone[dist.get_rank()][0]:
        _remove_empty(missing)
    for rank, (seen, path, host) in enumerate(everyone):
        if not seen:
            raise UsageError(
                f"ranks of one job differ: the run directory is {everyone[0][1]} on rank 0, and {path} on rank {rank} "
                f"(host {host}) is another folder. Give --out a folder that all hosts share: all ranks write into one "
                "checkpoint"
            )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}; give another --out") from None


def _leave(marker: Path) -> None:
    try:
        marker.touch()
    except OSError as error:
        raise UsageError(f"{marker.parent} cannot be written: {error.strerror}; give another --out") from None


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made a moment ago, innermost first, unless somebody uses them."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _settings(prepared: Prepared) -> dict[str, Any]:
    """Return software, settings and the model's own config, flat."""
    said: dict[str, Any] = {"zoo": __version__, "torch": str(torch.__version__)}
    for section, values in prepared.job.settings().items():
        said |= {f"{section}.{key}": value for key, value in values.items()}
    said |= {f"config.json {key}": value for key, value in prepared.hub_config.items()}
    kept = {name: value for name, value in said.items() if name not in (*_PATHS, *_OF_ONE_RANK)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _weights(prepared: Prepared) -> str | None:
    """Return a digest of the weights a run starts from; None for random ones, which follow from the seed.

    Names, shapes, types, and a few values of every tensor: two trained models differ in all of them.
    """
    if prepared.source is None:
        return None
    tensors, digest = prepared.source.tensors, hashlib.sha256()
    for name in sorted(tensors.names()):
        digest.update(f"{name} {tensors.shape(name)} {tensors.dtype(name)}\0".encode())
        digest.update(_some_values(tensors, name))
    return digest.hexdigest()[:16]


def _some_values(tensors: TensorSource, name: str) -> bytes:
    """Return the bytes of a few values from the middle of a tensor."""
    shape = tensors.shape(name)
    if not shape or 0 in shape:
        return b""
    *outer, last = shape
    middle = [slice(size // 2, size // 2 + 1) for size in outer]
    first = max(0, last // 2 - _SAMPLED_VALUES // 2)
    piece = tensors.read(name, (*middle, slice(first, min(last, first + _SAMPLED_VALUES))))
    return piece.contiguous().view(torch.uint8).numpy().tobytes()


def _resumed(prepared: Prepared) -> dict[str, Any]:
    """Return the step a run goes on from, and a digest of what that checkpoint says of itself."""
    saved = finished.resume_point(prepared.out, prepared.job.checkpoint.resume)
    if saved is None:
        return {"resumed step": None}
    digest = hashlib.sha256()
    small = [path for path in saved.iterdir() if path.is_file() and path.stat().st_size <= _SMALL_BYTES]
    for path in sorted([*small, *(saved / "state").glob(".metadata")]):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    step = finished.read_progress(saved)["step"]
    return {"resumed step": step, "content of that checkpoint": digest.hexdigest()[:16]}


def _differences(expected: Facts, found: Facts, base: int, rank: int, host: str) -> str:
    """Return `optim.lr: 1e-05 on rank 0, 0.01 on rank 1 (host b)` for the first facts that are not the same."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    phrases = [
        f"{name}: {_shown(expected, name)} on rank {base}, {_shown(found, name)} on rank {rank} (host {host})"
        for name in names[:_SAID]
    ]
    return "; ".join(phrases) + (f"; and {len(names) - _SAID} more" if len(names) > _SAID else "")


def _shown(facts: Facts, name: str) -> str:
    value = facts.get(name)
    text = "unset" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
