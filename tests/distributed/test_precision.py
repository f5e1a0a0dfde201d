"""Mixed precision on the wire: weights travel in bfloat16 and gradients add up in float32, under every layout; and
the same run twice is the same bit for bit."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import layouts
from zoo.cli.main import main
from zoo.core.contracts.attention import AttentionProblem
from zoo.core.run import run as run_module
from zoo.core.run.determinism import determinism
from zoo.plugins.attention.sdpa_cuda import Cudnn
from zoo.testing import ranks

REDUCES = ("_reduce_scatter_base_", "allreduce_", "reduce_scatter_", "reduce_")


class CollectiveCounter(TorchDispatchMode):
    """Notes (kind, group, type, values) of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if torch.is_tensor(t)]
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            peers = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
            self.seen.append((func._opname, peers, str(tensors[0].dtype), tensors[0].numel()))
        return func(*args, **(kwargs or {}))


def wired(chosen):
    """On a rank: what a step sends, the ranks of each mesh, and types of what is kept."""
    run = layouts.Run(chosen)
    gradients = set()
    run.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(str(p.grad.dtype) for p in run.model.parameters())
    )
    with CollectiveCounter() as wire:
        run.step()
    axes = ("fsdp", "efsdp", "dp_replicate", "ddp", "eddp", "tp")
    meshes = {axis: tuple(dist.get_process_group_ranks(run.mesh[axis].get_group())) for axis in axes}
    kept = {str(p.dtype) for p in run.model.parameters()} | gradients
    return wire.seen, meshes, kept


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["fsdp", "zero1", "ddp"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama", "dp_replicate2 dp_shard2"),
        ("llama-tied", "tp2 dp_shard2"),
        ("llama-tied", "pp2 dp_shard2"),
        ("mixtral-plain", "tp2 dp_shard2 ep2"),
    ],
)
def test_weights_travel_in_bfloat16_and_gradients_add_up_in_float32(model, words, kind):
    seen, meshes, kept = ranks.run(4, wired, layouts.choose(model, f"{words} {kind} bf16"))[0]
    assert kept == {"torch.float32"}
    data = {meshes[axis] for axis in ("fsdp", "efsdp", "dp_replicate", "ddp", "eddp") if len(meshes[axis]) > 1}
    gathers = {dtype for op, peers, dtype, _ in seen if peers in data and "allgather" in op}
    assert gathers == (set() if kind == "ddp" else {"torch.bfloat16"})
    reduced = [(op, dtype) for op, peers, dtype, _ in seen if peers in data and op in REDUCES and "int" not in dtype]
    assert {dtype for _, dtype in reduced} == {"torch.float32"}
    assert any(op != "allreduce_" for op, _ in reduced) == (kind != "ddp")
    if "tp" in words:
        shared = {dtype for op, peers, dtype, n in seen if peers == meshes["tp"] and op == "allreduce_" and n > 1}
        assert shared - {"torch.int64"} == {"torch.float32"}


def twice(chosen):
    """On a rank: whether two runs of two steps under deterministic algorithms have the same bits, and what they had."""
    with determinism(True):
        one, two = (layouts.Run(chosen).steps(2) for _ in range(2))
    parts = [(name, *(x.to_local() if isinstance(x, DTensor) else x for x in (one[name], two[name]))) for name in one]
    return [name for name, a, b in parts if not torch.equal(a, b)], len(one)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama", ""),
        ("llama-tied", "pp2 tp2 zbv recompute"),
        ("mixtral", "dp_shard2 cp2 ep4 zero1"),
        ("nemotron", "dp_replicate2 tp2 ddp"),
    ],
)
def test_the_same_run_twice_has_the_same_bits(model, words):
    chosen = layouts.choose(model, f"{words} bf16")
    for differing, number in ranks.run(chosen.degrees.world_size, twice, chosen):
        assert differing == []
        assert number > 10


def test_the_mode_is_on_inside_and_off_again_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_computes_as_it_was_asked_to(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seen = []
    step = run_module.train_step
    monkeypatch.setattr(
        run_module,
        "train_step",
        lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()) or step(*args),
    )
    words = ["finetune", "llama3", "--steps", "1", "--seq", "64", "--out", str(tmp_path / "run")]
    assert main([*words, *(["--deterministic"] if asked else [])]) == 0
    assert seen == [asked]
    assert f"deterministic: {str(asked).lower()}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_kernel_without_a_fixed_order_says_so():
    problem = AttentionProblem(device="cuda", dtype="bfloat16", head_dim=128, num_heads=32, num_kv_heads=8)
    assert Cudnn().supports(problem) is None
    assert "--deterministic" in Cudnn().supports(replace(problem, deterministic=True))
