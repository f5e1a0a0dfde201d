"""What this machine computes with, and how fast that can be at most."""

from __future__ import annotations

import os
import resource
import sys
import time

import torch

# Dense peak of one accelerator in bf16, TFLOP/s, from the vendors' data sheets; matched as part of the device name.
_PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0}


def accelerator_type() -> str | None:
    """torch's name of the accelerator (`cuda`), or None."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else accelerator.type


def num_accelerators() -> int:
    return torch.accelerator.device_count() if accelerator_type() else 0


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of one accelerator, or of the machine where there is none."""
    if accelerator_type() == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_tflops(dtype: str, ranks: int) -> float | None:
    """Peak of one rank: the data sheet's for a known accelerator, measured on a CPU shared by `ranks`; else None."""
    if accelerator_type() is not None:
        name = torch.accelerator.current_accelerator() and torch.cuda.get_device_name(0)
        return next((peak for part, peak in _PEAK_TFLOPS.items() if part in str(name)), None)
    return _measured_tflops(getattr(torch, dtype)) / ranks


def peak_memory_bytes(device: torch.device) -> int:
    """Most this process has held: allocator peak on an accelerator, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measured_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """The best of a few square matrix products on all cores."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
