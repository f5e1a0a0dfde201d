"""Mixed precision on the wire: weights travel in bfloat16 and gradients add up in float32, under every layout; and
the same run twice is the same bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests import pipeline_model
from tests.distributed import ranks

REDUCES = ("_reduce_scatter_base_", "allreduce_", "reduce_scatter_", "reduce_")


class Wire(TorchDispatchMode):
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


def wired(model, degrees, choices):
    """On a rank: what a step sends, the ranks of each mesh, and types of what is kept."""
    run = pipeline_model.Run(model, degrees, dtype="bfloat16", **choices)
    gradients = set()
    run.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(str(p.grad.dtype) for p in run.model.parameters())
    )
    with Wire() as wire:
        run.step()
    axes = ("fsdp", "efsdp", "dp_replicate", "ddp", "eddp", "tp")
    meshes = {axis: tuple(dist.get_process_group_ranks(run.mesh[axis].get_group())) for axis in axes}
    kept = {str(p.dtype) for p in run.model.parameters()} | gradients
    return wire.seen, meshes, kept


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["fsdp", "zero1", "ddp"])
@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("llama", {"dp_replicate": 2, "dp_shard": 2}),
        ("llama-tied", {"tp": 2, "dp_shard": 2}),
        ("llama-tied", {"pp": 2, "dp_shard": 2}),
        ("mixtral", {"tp": 2, "dp_shard": 2, "ep": 2}),
    ],
)
def test_weights_travel_in_bfloat16_and_gradients_add_up_in_float32(model, degrees, kind):
    seen, meshes, kept = ranks.run(4, wired, model, degrees, {"data_parallel": kind})[0]
    assert kept == {"torch.float32"}
    data = {meshes[axis] for axis in ("fsdp", "efsdp", "dp_replicate", "ddp", "eddp") if len(meshes[axis]) > 1}
    gathers = {dtype for op, peers, dtype, _ in seen if peers in data and "allgather" in op}
    assert gathers == (set() if kind == "ddp" else {"torch.bfloat16"})
    reduced = [(op, dtype) for op, peers, dtype, _ in seen if peers in data and op in REDUCES and "int" not in dtype]
    assert {dtype for _, dtype in reduced} == {"torch.float32"}
    assert any(op != "allreduce_" for op, _ in reduced) == (kind != "ddp")
    if "tp" in degrees:
        shared = {dtype for op, peers, dtype, n in seen if peers == meshes["tp"] and op == "allreduce_" and n > 1}
        assert shared - {"torch.int64"} == {"torch.float32"}
