"""`zoo doctor`: what it says on this machine, and on machines that lack something."""

import json
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.cli.main import main
from zoo.core.machine import checkup
from zoo.core.registry.loading import Plugins


def gpu(count=8, compute=(9, 0), **more):
    """A torch that sees GPUs, as far as the checks look."""
    seen = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30, major=compute[0], minor=compute[1])
    cuda = SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        get_device_properties=lambda index: seen,
        nccl=SimpleNamespace(version=lambda: (2, 27, 3)),
    )
    accelerator = SimpleNamespace(
        is_available=lambda: count > 0,
        current_accelerator=lambda: SimpleNamespace(type="cuda"),
        device_count=lambda: count,
    )
    fields = {
        "__version__": "2.13.0+cu130",
        "version": SimpleNamespace(cuda="13.0", hip=None, xpu=None),
        "cuda": cuda,
        "accelerator": accelerator,
        "distributed": SimpleNamespace(is_nccl_available=lambda: True),
    }
    return SimpleNamespace(**{**fields, **more})


def test_this_machine_can_train(distributions, capsys):
    status = main(["doctor"])
    out = capsys.readouterr().out
    assert status == 0
    assert f"torch          {torch.__version__}" in out
    for topic in (
        "python",
        "cores",
        "memory",
        "disk",
        "host name",
        "loopback",
        "accelerators",
        "flash-attn",
        "gloo",
        "NCCL",
        "plugins",
    ):
        assert f"\n{topic} " in out
    assert "gloo           works" in out


def test_json_has_the_same_findings(distributions, capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert {"python", "torch", "gloo", "plugins"} <= {finding["topic"] for finding in found["findings"]}


def test_a_broken_plugin_is_a_finding_and_not_the_end(distributions, capsys):
    distributions.add("zoo-bad", "import no_such_module")
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert "would fail: bad (zoo-bad 1.0) is broken: ModuleNotFoundError" in captured.out
    assert "  fix: zoo plugins info bad" in captured.out
    assert "zoo-bad" not in captured.err


def test_without_a_model_nothing_can_be_trained(distributions, capsys):
    families = [status.name for status in Plugins.load(only=[]).statuses if "models" in status.entries]
    assert "llama3" in families
    assert main([*(f"--no-plugin={family}" for family in families), "doctor"]) == 1
    out = capsys.readouterr().out
    assert "cannot train: no plugin provides any model" in out
    assert f"fix: undo: {'; '.join(f'blocked by --no-plugin {family}' for family in families)}" in out


def test_without_torch_nothing_can_be_trained(distributions, capsys, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(checkup.importlib, "import_module", absent)
    finding = checkup.machine_findings()[-1]
    assert (finding.topic, finding.level, finding.fix) == ("torch", "fail", "pip install 'torch>=2.11'")


@pytest.mark.parametrize(("version", "level"), [("2.10.1", "fail"), ("2.11.0+cpu", "ok"), ("3.0.0a1", "ok")])
def test_torch_must_be_new_enough(version, level):
    assert checkup.torch_build(gpu(__version__=version)).level == level


def test_accelerators_are_named():
    assert checkup.accelerators(gpu(count=8)).found == "8 x cuda: NVIDIA H200, 141 GiB, compute 9.0"


def test_a_cuda_build_without_a_gpu_would_fail():
    finding = checkup.accelerators(gpu(count=0))
    assert finding.level == "warn"
    assert finding.trouble == "torch is built for CUDA 13.0 and sees no GPU"


def test_flash_attention_with_a_gpu_comes_with_the_command(monkeypatch):
    def absent(name):
        raise checkup.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checkup.metadata, "version", absent)
    assert "pip install flash-attn --no-build-isolation" in checkup.flash_attention(gpu()).found
    assert "pip install" not in checkup.flash_attention(gpu(count=0)).found


def test_a_flash_attention_that_does_not_import_would_fail(monkeypatch):
    monkeypatch.setattr(checkup.metadata, "version", lambda name: "2.8.3")
    finding = checkup.flash_attention(gpu())
    assert finding.level == "warn"
    assert "--force-reinstall" in finding.fix


def test_nccl():
    assert checkup.nccl(gpu()).found == "2.27.3"
    without = SimpleNamespace(is_nccl_available=lambda: False)
    assert checkup.nccl(gpu(distributed=without)).level == "warn"
    assert checkup.nccl(gpu(count=0, distributed=without)).level == "ok"


@pytest.mark.parametrize(("gib", "gpus", "level"), [(0.0625, 8, "warn"), (0.0625, 1, "ok"), (16, 8, "ok")])
def test_shared_memory_too_small_for_nccl(monkeypatch, gib, gpus, level):
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda place: SimpleNamespace(total=gib * 2**30))
    assert checkup.shared_memory(gpu(count=gpus)).level == level


def test_gloo_that_does_not_start_is_fatal(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Unable to resolve hostname")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    finding = checkup.gloo(torch)
    assert finding.level == "fail"
    assert "Unable to resolve hostname" in finding.trouble


@pytest.mark.parametrize(("chosen", "fix"), [(None, "ip link set lo up"), ("eth9", "unset GLOO_SOCKET_IFNAME")])
def test_gloo_without_its_interface_says_what_would_change_that(chosen, fix, monkeypatch):
    """What zoo sets itself, the loopback's name, is no advice; a name that somebody chose and that is not there is."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if chosen:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)

    def refuse(*args, **kwargs):
        raise RuntimeError(f"Unable to find address for: {chosen or 'lo'}")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    assert checkup.gloo(torch).fix.startswith(fix)


@pytest.mark.parametrize(
    ("answer", "level", "said"),
    [
        (["10.0.0.7", "10.0.0.7", "fd00::7"], "ok", "node-7 is 10.0.0.7 and fd00::7, looked up in "),
        (
            socket.gaierror(-2, "Name or service not known"),
            "warn",
            "does not resolve (Name or service not known, after",
        ),
        (None, "warn", "does not resolve within 0 s: torchrun waits for it"),
    ],
)
def test_the_hosts_own_name_is_looked_up(monkeypatch, answer, level, said):
    """The answer of a name server; None for one that never answers."""
    done = threading.Event()

    def look_up(name, port):
        assert name == "node-7"
        if answer is None:
            done.wait()
        if isinstance(answer, OSError):
            raise answer
        return [(None, None, None, "", (address, 0)) for address in answer or ()]

    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(checkup, "_NAME_S", 0 if answer is None else 600)
    finding = checkup.host_name()
    done.set()
    assert finding.level == level
    assert said in f"{finding.found} {finding.trouble}"
    assert ("/etc/hosts" in finding.fix) == (level == "warn")


def test_a_loopback_that_is_down_is_fatal(monkeypatch):
    assert checkup.loopback().found == "works"

    def refuse(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_server", refuse)
    finding = checkup.loopback()
    assert (finding.level, "Network is unreachable" in finding.trouble) == ("fail", True)


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def torn(torch):
        raise RuntimeError("driver too old\nsecond line")

    finding = checkup._looked(torn, None)
    assert (finding.topic, finding.level) == ("torn", "warn")
    assert finding.found == "cannot be determined: RuntimeError: driver too old"


def test_a_full_disk_and_a_folder_that_cannot_be_written_to_would_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    assert "less than 5 GiB" in checkup.disk(tmp_path).trouble
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert "cannot be written to" in checkup.disk(tmp_path).trouble


def test_a_containers_limits_are_seen(monkeypatch):
    limits = {"cpu.max": "150000 100000\n", "memory.max": f"{2**30}\n"}
    monkeypatch.setattr(checkup, "_cgroup", limits.get)
    assert checkup.cores().found.endswith("limited to 1.5")
    assert "limited to 1.0 GiB" in checkup.memory().found
    monkeypatch.setattr(checkup, "_cgroup", lambda name: "max 100000\n" if name == "cpu.max" else "max\n")
    assert "limited" not in checkup.cores().found + checkup.memory().found
    assert Path("/proc/meminfo").exists() == ("available" in checkup.memory().found)
