"""Files compared with their checksums by all ranks together: each byte is read once, and all come to one answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from zoo.core.contracts.checkpoints import HubCheckpoint
from zoo.core.launch.collective import on_rank_zero
from zoo.core.machine.device import num_cores
from zoo.core.storage.checksums import Checksums
from zoo.core.storage.finished import damaged, flaw, not_as_written

_MAX_THREADS = 8


def check_among_ranks(path: Path) -> None:
    """Compare a checkpoint of a run with its checksums, if it has any; collective. Raise DataError on every rank."""
    checksums, reason = on_rank_zero(lambda: _first_look(path))
    if checksums is not None:
        reason = _changed(checksums)
    if reason is not None:
        raise on_rank_zero(lambda: damaged(path, reason, flag="--resume "))


def check_source_among_ranks(source: HubCheckpoint) -> None:
    """Compare what weights come from with its checksums, if it has any; collective. Raise DataError on every rank."""
    checksums = source.checksums
    reason = None if checksums is None else _changed(checksums)
    if checksums is not None and reason is not None:
        raise on_rank_zero(lambda: not_as_written(checksums, reason, of_run=source.own_names))


def _first_look(path: Path) -> tuple[Checksums | None, str | None]:
    """Return the checksums to compare with, if any, or what is wrong by names and lengths already."""
    reason = flaw(path)
    return (None, reason) if reason else (Checksums.read(path), None)


def _changed(checksums: Checksums) -> str | None:
    """Read all files, each rank a share, and return what is wrong, the same everywhere. Lengths are right already."""
    pieces, rank, ranks = checksums.pieces(), dist.get_rank(), dist.get_world_size()
    total, before, mine = sum(piece.length for piece in pieces), 0, []
    for piece in pieces:
        # By where its middle lies: every piece is one rank's, and each rank has a run of neighbours.
        if (2 * before + piece.length) * ranks // (2 * total) == rank:
            mine.append(piece)
        before += piece.length
    threads = min(_MAX_THREADS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, checksums.crcs(mine, threads))
    return checksums.fault(pieces, {piece: crc for crcs in everyone for piece, crc in crcs.items()})
