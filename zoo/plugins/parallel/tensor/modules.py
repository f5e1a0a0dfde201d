"""Modules that the `tensor` adapter puts in place of a model's, with the same parameters under the same names.

B rows, T tokens, P ranks of `tp`, D model width, V vocabulary. A cut parameter is a DTensor on `tp`, so that FSDP2,
checkpoints and norms know the whole it is part of; what is computed with is the part that lies here.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from zoo.plugins.parallel.tensor.ranks import TensorRanks


class CutModule(nn.Module):
    """Holds the parameters that a module held itself."""

    def __init__(self, ranks: TensorRanks, parameters: dict[str, nn.Parameter | None]) -> None:
        super().__init__()
        self.ranks = ranks
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))


class Colwise(CutModule):
    """A linear layer of which a rank computes a P-th of the outputs, from the whole input."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, h: Tensor) -> Tensor:
        """h as the residual lies, to `[B, T, outputs / P]`."""
        out = self.ranks.enter_linear(h, here(self.weight))
        return out if self.bias is None else out + here(self.bias)


class Rowwise(CutModule):
    """A linear layer that has a P-th of its inputs here; outputs are sums over ranks, and the bias is added once."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, inputs / P]` to outputs as the residual lies."""
        out = self.ranks.leave_linear(x, here(self.weight))
        return out if self.bias is None else out + self.bias


class VocabularyEmbedding(CutModule):
    """An embedding that has the vectors of V / P words here."""

    weight: nn.Parameter

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[B, T]` to `[B, T, D]` as the residual lies."""
        self.ranks.row_of(tokens.shape[1])
        weight = here(self.weight)
        local = tokens - self.ranks.rank * weight.shape[0]
        absent = (local < 0) | (local >= weight.shape[0])
        found = functional.embedding(local.masked_fill(absent, 0), weight)
        return self.ranks.leave(found.masked_fill(absent[..., None], 0.0))


class VocabularyHead(CutModule):
    """A head that has the rows of V / P words here."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, h: Tensor) -> Tensor:
        """h as the residual lies, to whole logits `[B, T, V]` on every rank. Training goes by the loss seam instead."""
        logits = functional.linear(self.ranks.enter(h), here(self.weight), _maybe_here(self.bias))
        assert isinstance(self.weight, DTensor)
        return DTensor.from_local(logits, self.weight.device_mesh, [Shard(2)], run_check=False).full_tensor()


class PartOfRow(nn.Module):
    """The row_part seam where the residual is cut on tokens over `tp`."""

    def __init__(self, inner: nn.Module, ranks: TensorRanks) -> None:
        super().__init__()
        self.inner = inner
        self.ranks = ranks

    def forward(self, of_tokens: Tensor) -> Tensor:
        return self.ranks.part(self.inner(of_tokens))


class SharedRow(nn.Module):
    """The row_sum seam where the ranks of `tp` share a row."""

    def __init__(self, inner: nn.Module, ranks: TensorRanks) -> None:
        super().__init__()
        self.inner = inner
        self.ranks = ranks

    def forward(self, counts: Tensor) -> Tensor:
        total: Tensor = self.ranks.total(self.inner(counts))
        return total


def here(parameter: Tensor) -> Tensor:
    """The part of a cut parameter that lies on this rank."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _maybe_here(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else here(parameter)
