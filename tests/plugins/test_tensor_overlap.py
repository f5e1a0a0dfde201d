"""Products that overlap their messages are the plain ones: outputs and all gradients, over real ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from zoo.cli.main import main
from zoo.core.sequence.ranges import share_of
from zoo.plugins.parallel.tensor import overlap as tensor_overlap
from zoo.plugins.parallel.tensor.modules import Colwise, Rowwise
from zoo.plugins.parallel.tensor.overlap import OverlappingRanks
from zoo.plugins.parallel.tensor.ranks import TensorRanks
from zoo.testing import ranks

WIDTH, INNER = 6, 8


def linear(kind, tensor_ranks, mesh, weight, dim):
    placed = DTensor.from_local(weight.chunk(mesh.size(), dim)[mesh.get_local_rank()], mesh, [Shard(dim)])
    return kind(tensor_ranks, {"weight": nn.Parameter(placed), "bias": None})


def block(kind, mesh, length):
    """An MLP of two gates that share their input: output, and gradients of the input and of every weight."""
    tensor_ranks = kind(mesh.get_group(), sequence=True)
    tensor_ranks.row_of(length)
    torch.manual_seed(1)
    row = torch.randn(1, length, WIDTH, dtype=torch.float64)
    up, gate = (torch.randn(INNER, WIDTH, dtype=torch.float64) for _ in range(2))
    down = torch.randn(WIDTH, INNER, dtype=torch.float64)
    layers = [
        linear(Colwise, tensor_ranks, mesh, up, 0),
        linear(Colwise, tensor_ranks, mesh, gate, 0),
        linear(Rowwise, tensor_ranks, mesh, down, 1),
        linear(Colwise, tensor_ranks, mesh, up, 0),
    ]
    each = -(-length // mesh.size())
    first = each * mesh.get_local_rank()
    here = row[:, first : first + share_of(length, mesh.get_local_rank(), mesh.size())].clone().requires_grad_()
    middle = layers[2](layers[0](here) * layers[1](here).sigmoid())
    out = layers[3](middle)
    (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out).cos()).sum().backward()
    return [out.detach(), here.grad, *(layer.weight.grad.to_local() for layer in layers)]


def both_ways(length):
    """On a rank. torch's kernels are CUDA's; it has the same functions in plain operators for any device."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    calls = []

    def counted(function):
        return lambda *arguments, **named: (calls.append(function.__name__), function(*arguments, **named))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_overlap, "all_gather_matmul", counted(symmetric_memory._fused_all_gather_matmul_fallback))
        patch.setattr(
            tensor_overlap, "matmul_reduce_scatter", counted(symmetric_memory._fused_matmul_reduce_scatter_fallback)
        )
        found = block(OverlappingRanks, mesh, length)
    return found, block(TensorRanks, mesh, length), len(calls)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "length", "overlapped"), [(2, 8, 5), (4, 12, 5), (2, 7, 0)])
def test_overlapping_products_are_the_plain_ones(world, length, overlapped):
    """Three go ahead and two back: gradients of the two gates come together before they are scattered."""
    for found, wanted, calls in ranks.run(world, both_ways, length):
        assert calls == overlapped
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_is_refused_where_there_are_no_such_kernels(capsys):
    assert main(["plan", "llama3", "--seq", "64", "--tp", "2", "--set", "layout.overlap_tensor=true"]) == 2
    assert "layout.overlap_tensor=true needs CUDA devices" in capsys.readouterr().err
