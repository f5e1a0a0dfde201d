"""What this machine computes with, and how fast that can be at most."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from typing import TypeVar

import torch

Default = TypeVar("Default", float, None)

# Dense peak of one accelerator in bf16, TFLOP/s, from the vendors' data sheets. A key is words of the device's name;
# the first key that has all of its words there counts, so narrower keys come first.
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}

# What a rank sends a second to another on the same machine, by the same sheets: NVLink. All others have PCIe.
_LINK_BYTES = {"GB200": 900e9, "B200": 900e9, "GH200": 450e9, "H200": 450e9, "H100": 450e9, "A100": 300e9}
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
    """Return the peak of one rank for a type of arithmetic, None where it is not known.

    Of an accelerator it is known from data sheets, in bf16 only. Of a CPU, which `ranks` share, it is measured, but not
    in bf16: one large product says nothing there, for products of other shapes are several times as fast.
    """
    if accelerator_type() is not None:
        return _known(_PEAK_TFLOPS, None) if dtype == "bfloat16" else None
    return None if dtype == "bfloat16" else _measured_tflops(getattr(torch, dtype)) / ranks


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
    """What a table says of this machine's accelerator. A part of one (MIG) is in no table."""
    name = torch.cuda.get_device_name(0) if accelerator_type() == "cuda" else ""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return default
    return next((value for key, value in table.items() if words.issuperset(key.split())), default)


def _measured_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """The best of a few square matrix products on all cores."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
