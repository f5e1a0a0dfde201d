"""The `tensor` adapter: matrices are cut over the axis `tp` as the plan says, norms and the residual on tokens.

Megatron's cut (1909.08053, 2205.05198): `colwise` matrices by outputs, `rowwise` ones by inputs, embedding and head by
words of the vocabulary. What sees tokens one by one, experts too, is whole on every rank, on its own tokens, and a norm
of heads on its own heads: gradients are parts until a step's last backward is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from zoo import Layout, ParallelAdapter, ParallelPlan, Phase, TensorStyle, UsageError, find_modules, replace_modules
from zoo.core.contracts.globs import matches
from zoo.core.contracts.models import CUT_STYLES
from zoo.plugins.parallel.tensor.loss import VocabularyLoss
from zoo.plugins.parallel.tensor.modules import (
    Colwise,
    CutModule,
    PartOfRow,
    Rowwise,
    SharedRow,
    VocabularyEmbedding,
    VocabularyHead,
)
from zoo.plugins.parallel.tensor.overlap import OverlappingRanks
from zoo.plugins.parallel.tensor.ranks import TensorRanks, add_up
from zoo.plugins.parallel.tensor.traffic import account_tensor

if TYPE_CHECKING:
    from zoo import Account, Mesh

_LINEAR: Mapping[TensorStyle, type[CutModule]] = {"colwise": Colwise, "rowwise": Rowwise, "vocab": VocabularyHead}


class TensorParallel(ParallelAdapter):
    """Tensor parallelism, and by default sequence parallelism, for any model whose plan says how it may be cut."""

    name: ClassVar[str] = "tensor"
    axes: ClassVar[tuple[str, ...]] = ("tp",)
    phase: ClassVar[Phase] = Phase.SHARD

    def check(self, layout: Layout) -> str | None:
        """None, or what `tp` does not divide."""
        degree, counts = layout.degrees.tp, _counts(layout)
        if not layout.model.widths:
            return f"--tp {degree} cuts matrices and the plan of {layout.model.name} names none"
        if layout.model.experts is not None and not layout.settings.sequence_parallel:
            return f"--tp {degree} with layout.sequence_parallel=false would send a token to its experts {degree} times"
        if layout.settings.overlap_tensor and (layout.device != "cuda" or not layout.settings.sequence_parallel):
            return (
                "layout.overlap_tensor=true needs CUDA devices that reach each other's memory, and sequence parallelism"
            )
        what = next((f"{count:,} {name}" for count, name in counts if count % degree), None)
        return what and f"--tp {degree} does not divide the {what} of {layout.model.name}"

    def apply(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> nn.Module:
        """Replace what the plan cuts by modules that hold a P-th, and swap the seams. All on meta.

        Raises UsageError if the plan cuts a module that is neither linear nor an embedding, or a head without a loss.
        """
        kind = OverlappingRanks if layout.settings.overlap_tensor else TensorRanks
        ranks = kind(mesh["tp"].get_group(), sequence=layout.settings.sequence_parallel)
        cut = _Cutter(ranks, mesh["tp"])
        styles = _styles(model, plan)
        for name, style in styles.items():
            if style in CUT_STYLES:
                model.set_submodule(name, cut(name, style, model.get_submodule(name)))
        if ranks.sequence:
            _share_rows(model, plan, ranks)
        if "vocab" in styles.values():
            if "loss" not in plan.seams:
                raise UsageError(
                    f"--tp cuts the head of {type(model).__name__} and its plan names no seam 'loss'; use --tp 1"
                )
            replace_modules(model, plan.seams["loss"], lambda _old: VocabularyLoss(ranks), owner=self.name)
        for name in find_modules(model, plan.block):
            model.get_submodule(name).register_forward_pre_hook(ranks.watch)
        return model

    def complete_gradients(self, model: nn.Module, plan: ParallelPlan, mesh: Mesh, layout: Layout) -> None:
        """Add up the gradients that are parts on each rank of `tp`.

        Under sequence parallelism those of all that is not cut: a rank saw its own tokens. Otherwise those of what
        works on heads: a rank saw its own heads, and of the residual everything.
        """
        parameters = _uncut(model) if layout.settings.sequence_parallel else _of_heads(model, plan)
        gradients = [p.grad for p in parameters if p.grad is not None]
        add_up([g.to_local() if isinstance(g, DTensor) else g for g in gradients], mesh["tp"].get_group())

    def account(self, account: Account) -> None:
        """Add what hidden states cost where they meet cut matrices, and what is not cut in the end."""
        account_tensor(account)


def _share_rows(model: nn.Module, plan: ParallelPlan, ranks: TensorRanks) -> None:
    """Swap the seams that must know that a rank has a part of a row's tokens."""
    if "row_part" in plan.seams:
        replace_modules(model, plan.seams["row_part"], lambda old: PartOfRow(old, ranks), owner=TensorParallel.name)
    if "row_sum" in plan.seams:
        replace_modules(model, plan.seams["row_sum"], lambda old: SharedRow(old, ranks), owner=TensorParallel.name)


def _uncut(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not _is_cut(parameter)]


def _of_heads(model: nn.Module, plan: ParallelPlan) -> list[nn.Parameter]:
    """Parameters of the modules that the plan calls `heads`, each once though several modules may share it."""
    modules = [model.get_submodule(name) for name, style in _styles(model, plan).items() if style == "heads"]
    return list(dict.fromkeys(p for module in modules for p in module.parameters(recurse=False)))


def _is_cut(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def _counts(layout: Layout) -> list[tuple[int, str]]:
    """What must be dealt out evenly, and what it is."""
    heads = [(shape.num_heads, "query heads") for shape in layout.model.heads]
    heads += [(shape.num_kv_heads, "key/value heads") for shape in layout.model.heads]
    return heads + [(width, f"rows or columns of {name}") for name, width in layout.model.widths]


def _styles(model: nn.Module, plan: ParallelPlan) -> dict[str, TensorStyle]:
    """Modules by name, and how they are cut. In a pipeline a rank lacks those of other stages, or their parameters."""
    held = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return {name: style for glob, style in plan.tensor.items() for name in held if matches(name, glob)}


class _Cutter:
    """Modules to their cut forms; a parameter that two of them share stays one."""

    def __init__(self, ranks: TensorRanks, mesh: DeviceMesh) -> None:
        self.ranks, self.mesh = ranks, mesh
        self._placed: dict[int, nn.Parameter] = {}

    def __call__(self, name: str, style: TensorStyle, module: nn.Module) -> CutModule:
        if isinstance(module, nn.Embedding) and style == "vocab":
            _plain_embedding(name, module)
            return VocabularyEmbedding(self.ranks, {"weight": self._part(module.weight, 0)})
        if not isinstance(module, nn.Linear):
            raise UsageError(
                f"--tp cannot cut '{name}' {style}: {type(module).__name__} is no linear layer; use --tp 1"
            )
        dim = 1 if style == "rowwise" else 0
        bias = module.bias if style == "rowwise" or module.bias is None else self._part(module.bias, 0)
        return _LINEAR[style](self.ranks, {"weight": self._part(module.weight, dim), "bias": bias})

    def _part(self, parameter: Tensor, dim: int) -> nn.Parameter:
        if id(parameter) not in self._placed:
            local = parameter.detach().narrow(dim, 0, parameter.shape[dim] // self.ranks.size).contiguous()
            placed = DTensor.from_local(local, self.mesh, [Shard(dim)], run_check=False)
            self._placed[id(parameter)] = nn.Parameter(placed, requires_grad=parameter.requires_grad)
        return self._placed[id(parameter)]


def _plain_embedding(name: str, module: nn.Embedding) -> None:
    if module.padding_idx is not None or module.max_norm is not None:
        raise UsageError(f"--tp cannot cut '{name}': an embedding with padding_idx or max_norm; use --tp 1")
