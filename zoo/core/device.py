"""What this machine computes with, and how fast that can be at most."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping
from typing import TypeVar

import torch

Default = TypeVar("Default", float, None)

# Dense peak of one accelerator in bf16, TFLOP/s, from the vendors' data sheets; matched as part of the device name.
_PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0}

# What a rank sends a second to another on the same machine, by the same sheets: NVLink, or PCIe where there is none.
_LINK_BYTES = {"B200": 900e9, "H200": 450e9, "H100": 450e9, "A100": 300e9, "L40S": 32e9, "L4": 32e9, "A10": 32e9}
_NETWORK_BYTES = 50e9
"""A 400 Gbit/s adapter for each accelerator."""
_ATTENTION_SHARE = 0.5
"""Of the peak that attention kernels reach, forward and backward."""
_CORE_FLOPS, _LOOPBACK_BYTES = 50e9, 1e9
"""A core with wide vectors in fp32, and gloo between processes of a machine: for forecasts only."""


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
        return _known(_PEAK_TFLOPS, None)
    return _measured_tflops(getattr(torch, dtype)) / ranks


def attention_flops(dtype: str, ranks: int) -> float:
    """FLOP/s that a rank's attention is expected to reach. A constant of the machine, so that all ranks agree."""
    if accelerator_type() is None:
        return _CORE_FLOPS * min(1.0, num_cores() / ranks) * (0.5 if dtype == "float64" else 1.0)
    peak = _known(_PEAK_TFLOPS, 312.0) * 1e12
    return _ATTENTION_SHARE * peak / (8 if dtype == "float32" else 1)


def link_bytes(ranks: int) -> float:
    """Bytes a second that a rank of a group of so many is expected to send to another."""
    if accelerator_type() is None:
        return _LOOPBACK_BYTES
    return _known(_LINK_BYTES, 32e9) if ranks <= num_accelerators() else _NETWORK_BYTES


def peak_memory_bytes(device: torch.device) -> int:
    """Most this process has held: allocator peak on an accelerator, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _known(table: Mapping[str, float], default: Default) -> float | Default:
    """What a table says of this machine's accelerator."""
    name = torch.cuda.get_device_name(0) if accelerator_type() == "cuda" else ""
    return next((value for part, value in table.items() if part in name), default)


def _measured_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """The best of a few square matrix products on all cores."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
