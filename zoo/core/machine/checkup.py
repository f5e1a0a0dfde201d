"""Looks at the machine and changes nothing: interpreter, torch, accelerators, collectives, memory, disk, names."""

from __future__ import annotations

import importlib
import os
import platform
import queue
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from zoo.core.errors import one_line

GIB = 2**30
_MIN_TORCH = (2, 11)
_FREE_DISK_GIB = 5
_SHM_GIB = 1
_NAME_S = 5
"""How long a name may take. One look-up that goes unanswered takes as long, and starting ranks makes several."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `warn`: some jobs would fail; `fail`: no job can run."""

    topic: str
    found: str
    level: Literal["ok", "warn", "fail"] = "ok"
    trouble: str = ""
    """What would fail, where `found` does not say it already."""
    fix: str = ""
    """What to type or change."""


def machine_findings() -> list[Finding]:
    """Everything about the machine; about torch only what an import of it allows."""
    findings = [python(), cores(), memory(), disk(Path.cwd()), host_name(), loopback()]
    torch, trouble = _torch()
    if torch is None:
        return [*findings, trouble]
    looks: tuple[Callable[[Any], Finding], ...] = (
        torch_build,
        accelerators,
        flash_attention,
        gloo,
        nccl,
        shared_memory,
    )
    return [*findings, *(_looked(look, torch) for look in looks)]


def _looked(look: Callable[[Any], Finding], torch: ModuleType) -> Finding:
    try:
        return look(torch)
    except Exception as error:  # a driver that fails in its own way is a finding too
        said = f"cannot be determined: {one_line(error)}"
        return Finding(
            look.__name__, said, level="warn", fix="python -c 'import torch; print(torch.__config__.show())'"
        )


def python() -> Finding:
    return Finding("python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")


def cores() -> Finding:
    """Cores this process may use, by affinity and by a container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    limited = quota[:1] not in ([], ["max"])
    return Finding("cores", f"{usable}{f', limited to {int(quota[0]) / int(quota[1]):.1f}' if limited else ''}")


def memory() -> Finding:
    """Memory of the machine, and a container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max").strip()
    limited = limit.isdigit() and int(limit) < total
    free = _available_memory()
    parts = [
        f"{total / GIB:.1f} GiB",
        *([f"limited to {int(limit) / GIB:.1f} GiB"] if limited else []),
        *([f"{free / GIB:.1f} GiB available"] if free else []),
    ]
    return Finding("memory", ", ".join(parts))


def disk(place: Path) -> Finding:
    """Free space where a run would be written by default."""
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:.1f} GiB free in {place}"
    if not os.access(place, os.W_OK):
        return Finding(
            "disk", found, "warn", f"{place} cannot be written to, so runs/ cannot", "--out DIRECTORY elsewhere"
        )
    if free < _FREE_DISK_GIB:
        trouble = f"less than {_FREE_DISK_GIB} GiB are free in {place}: checkpoints of all but tiny models do not fit"
        return Finding("disk", found, "warn", trouble, "--out DIRECTORY elsewhere")
    return Finding("disk", found)


def host_name() -> Finding:
    """Whether this host's own name resolves, and to what. Only runs on several hosts need it, and torchrun."""
    name = socket.gethostname()
    fix = f"a line '127.0.1.1 {name}' in /etc/hosts; on several hosts the address by which the others reach this one"
    trouble = f"the name of this host, '{name}', does not resolve%s: torchrun waits for it, zoo on one machine does not"
    answers: queue.Queue[set[str] | OSError] = queue.Queue()
    began = time.monotonic()
    # No look-up can be interrupted; a thread that is left behind ends with the process.
    threading.Thread(target=_look_up, args=(name, answers), daemon=True).start()
    try:
        answer = answers.get(timeout=_NAME_S)
    except queue.Empty:
        return Finding("host name", f"{name}: no answer", "warn", trouble % f" within {_NAME_S} s", fix)
    took = time.monotonic() - began
    if isinstance(answer, OSError):
        return Finding(
            "host name", f"{name}: unknown", "warn", trouble % f" ({answer.strerror}, after {took:.1f} s)", fix
        )
    return Finding("host name", f"{name} is {' and '.join(sorted(answer))}, looked up in {1000 * took:.0f} ms")


def _look_up(name: str, answers: queue.Queue[set[str] | OSError]) -> None:
    try:
        answers.put({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError as error:
        answers.put(error)


def loopback() -> Finding:
    """Whether processes of this machine can talk over 127.0.0.1, as the ranks of one machine do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
            client.settimeout(_NAME_S)
            client.connect(server.getsockname())
    except OSError as error:
        trouble = f"ranks of this machine cannot talk to each other over 127.0.0.1: {one_line(error)}"
        return Finding("loopback", "does not work", "fail", trouble, "ip link set lo up; a firewall must let it pass")
    return Finding("loopback", "works")


def _torch() -> tuple[ModuleType | None, Finding]:
    try:
        return importlib.import_module("torch"), Finding("torch", "")
    except Exception as error:
        return None, Finding("torch", one_line(error), "fail", fix="pip install 'torch>=2.11'")


def torch_build(torch: Any) -> Finding:
    """Version, and what it was built for."""
    build = next(
        (f"{name} {version}" for name in ("cuda", "hip", "xpu") if (version := getattr(torch.version, name, None))),
        "CPU",
    )
    found = f"{torch.__version__}, built for {build}"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _MIN_TORCH:
        return Finding("torch", found, "fail", fix="pip install --upgrade 'torch>=2.11'")
    return Finding("torch", found)


def accelerators(torch: Any) -> Finding:
    """Accelerators torch can use, and those it cannot for want of the right build."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        count = torch.accelerator.device_count()
        names = sorted({_device_name(torch, kind, index) for index in range(count)})
        return Finding("accelerators", f"{count} x {kind}: {'; '.join(names)}")
    if torch.version.cuda:
        trouble = f"torch is built for CUDA {torch.version.cuda} and sees no GPU"
        return Finding("accelerators", "none", "warn", trouble, "nvidia-smi (driver), echo $CUDA_VISIBLE_DEVICES")
    if Path("/dev/nvidiactl").exists():
        trouble = "this machine has an NVIDIA driver, and torch is a CPU build: jobs run on the CPU"
        return Finding(
            "accelerators", "none", "warn", trouble, "install a CUDA build of torch (pytorch.org, Get Started)"
        )
    return Finding("accelerators", "none: jobs run on the CPU over gloo")


def _device_name(torch: Any, kind: str, index: int) -> str:
    if kind != "cuda":
        return str(kind)
    seen = torch.cuda.get_device_properties(index)
    return f"{seen.name}, {seen.total_memory / GIB:.0f} GiB, compute {seen.major}.{seen.minor}"


def flash_attention(torch: Any) -> Finding:
    """flash-attn's version where a CUDA device could run it, or the command to get it."""
    build = "pip install flash-attn --no-build-isolation"
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        if not torch.cuda.is_available():
            return Finding("flash-attn", "not installed; of use with a CUDA device only, the sdpa backend serves here")
        return Finding("flash-attn", f"not installed; optional, the sdpa backend serves; to get it: {build}")
    try:
        importlib.import_module("flash_attn")
    except Exception as error:
        trouble = f"flash-attn {version} does not import: {one_line(error)} (often: built for another torch)"
        return Finding("flash-attn", f"{version}, broken", "warn", trouble, f"{build} --force-reinstall --no-deps")
    return Finding("flash-attn", version)


def gloo(torch: Any) -> Finding:
    """Whether ranks on CPUs can talk, by starting a group of one."""
    if not torch.distributed.is_available():
        trouble = "torch was built without torch.distributed"
        return Finding("gloo", "missing", "fail", trouble, "pip install --force-reinstall 'torch>=2.11'")
    if torch.distributed.is_initialized():
        return Finding("gloo", "in use")
    try:
        store = torch.distributed.HashStore()
        with importlib.import_module("zoo.core.launch.process_group").without_names():
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            torch.distributed.destroy_process_group()
    except Exception as error:
        trouble = f"ranks cannot talk to each other: {one_line(error)}"
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        fix = "unset GLOO_SOCKET_IFNAME (one machine)" if chosen else "ip link set lo up"
        return Finding("gloo", "does not start", "fail", trouble, fix)
    return Finding("gloo", "works")


def nccl(torch: Any) -> Finding:
    """Whether ranks on CUDA devices can talk."""
    if torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "available"
        return Finding("NCCL", version)
    if torch.cuda.is_available():
        trouble = "torch has no NCCL, so several GPUs cannot work together"
        return Finding("NCCL", "missing", "warn", trouble, "install a CUDA build of torch (pytorch.org, Get Started)")
    return Finding("NCCL", "missing; of use with CUDA devices only")


def shared_memory(torch: Any) -> Finding:
    """/dev/shm, through which NCCL moves data between the GPUs of a machine; containers often get 64 MiB."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "no /dev/shm")
    size = shutil.disk_usage(place).total / GIB
    found = f"{size:.2f} GiB in {place}"
    if size < _SHM_GIB and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        trouble = f"{place} is too small for NCCL between {torch.cuda.device_count()} GPUs"
        return Finding("shared memory", found, "warn", trouble, "docker run --shm-size=16g (or --ipc=host)")
    return Finding("shared memory", found)


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text()
    except OSError:
        return ""


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
