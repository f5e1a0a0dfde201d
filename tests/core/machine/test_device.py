"""The peak that `mfu` is a share of: from data sheets or measured, and None where neither says anything."""

from __future__ import annotations

import json

import pytest
import torch

from zoo.cli.main import main
from zoo.core.machine import device


@pytest.fixture
def named(monkeypatch):
    """Let this machine have an accelerator of a name."""

    def name(text):
        monkeypatch.setattr(device, "accelerator_type", lambda: "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: text)

    return name


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GH200 480GB", 989.0),
        # Names that have another one's as a part.
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_an_accelerators_peak_is_its_data_sheets_in_bfloat16(named, name, peak):
    named(name)
    assert device.peak_tflops("bfloat16", 8) == peak
    assert device.peak_tflops("float32", 8) is None
    assert device.peak_tflops("float64", 8) is None


@pytest.mark.parametrize("name", ["NVIDIA A10G", "AMD Instinct MI300X"])
def test_forecasts_take_a_guess_for_what_is_in_no_table(named, name):
    named(name)
    assert device.attention_flops("bfloat16", 2) > 0
    assert device.link_bytes(2) > 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a CPU")
def test_a_cpus_peak_is_measured_but_for_bfloat16():
    assert device.peak_tflops("float32", 1) > 0
    assert device.peak_tflops("bfloat16", 1) is None


@pytest.mark.dist
@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a CPU")
@pytest.mark.parametrize("given", [False, True])
def test_a_run_in_bfloat16_on_a_cpu_has_mfu_only_by_a_peak_that_is_given(tmp_path, capsys, given):
    more = ["--set", "log.peak_tflops=2"] if given else []
    words = ["--seq", "64", "--steps", "1", "--dtype", "bfloat16", "--out", str(tmp_path / "run"), *more]
    assert main(["finetune", "llama3", *words]) == 0
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert ("mfu" in step) == given
    assert ("mfu" in capsys.readouterr().err) == given
