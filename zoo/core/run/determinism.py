"""`--deterministic`: sums in a fixed order, so that a run on the same ranks gives the same bits again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic as torch_deterministic

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside `with`, if wanted, an operation that has a deterministic form takes it, and one that has none raises.

    Entered before anything is computed: cuBLAS reads its variable when it is first used. Attention kernels follow
    `torch.are_deterministic_algorithms_enabled`.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    chooses = torch.backends.cudnn.benchmark
    fills: bool = torch_deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # It finds reads of what was never written, which is a matter of tests, and costs a write of every buffer.
    torch_deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if workspace is None:
            del os.environ[_WORKSPACE]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = chooses
        torch_deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
