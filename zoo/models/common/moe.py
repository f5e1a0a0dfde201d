"""A mixture of SwiGLU experts that drops no token, and the loss that keeps its experts busy.

B rows, T tokens, R = B * T, D model width, I inner width, E experts, K experts a token goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo import RouterStats, Routing
from zoo.core.model.routing import by_expert, combine, spread

if TYPE_CHECKING:
    from zoo import Layout

_ONE_KERNEL = {("cuda", torch.bfloat16)}
"""Where `grouped_mm` is one kernel. Elsewhere it is a loop of its own, on a CPU slower than ours (torch 2.13)."""
_ALIGNED_BYTES = 16


class GroupedMatmul(nn.Module):
    """The grouped-matmul seam: rows sorted by expert, times their expert's matrix. No parameters."""

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """rows `[M, A]`, weight `[E, B, A]`, counts `[E]` that add up to M or less, to `[M, B]`.

        What comes out for rows that are nobody's, the last ones, is undefined on an accelerator, forward and backward.
        An expert without rows gets a gradient of zeros, for optimizers and FSDP wait for every gradient.
        """
        if len(rows) and _has_kernel(weight):
            return functional.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
        sizes = counts.tolist()
        *parts, rest = torch.split(rows, [*sizes, len(rows) - sum(sizes)])
        done = [functional.linear(part, w) for part, w in zip(parts, weight.unbind(), strict=True)]
        return torch.cat([*done, rest.new_zeros(len(rest), weight.shape[1])])


def _has_kernel(weight: Tensor) -> bool:
    """Whether the device multiplies groups at once, which needs rows that start at multiples of 16 bytes."""
    aligned = all(size * weight.element_size() % _ALIGNED_BYTES == 0 for size in weight.shape[1:])
    return (weight.device.type, weight.dtype) in _ONE_KERNEL and aligned


class Experts(nn.Module):
    """E experts w2(silu(w1 x) * w3 x), the hub's matrices stacked on dim 0."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.matmul = GroupedMatmul()

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows `[M, D]`, those of expert 0 first, and counts `[E]` to `[M, D]`."""
        inner = functional.silu(self.matmul(rows, self.w1, counts)) * self.matmul(rows, self.w3, counts)
        out: Tensor = self.matmul(inner, self.w2, counts)
        return out


class Dispatch(nn.Module):
    """The dispatch seam: tokens to their experts and back, here with all experts at hand. No parameters."""

    def forward(self, x: Tensor, routing: Routing, experts: nn.Module) -> Tensor:
        """x `[R, D]` to the weighted sum of its experts' outputs `[R, D]`, 0 for padding; every other is served."""
        arranged = by_expert(routing.ids)
        rows = spread(x, arranged)
        # Copies of padding come last. A kernel leaves anything in their place, in its output and in its gradient.
        nobodys = (torch.arange(len(rows), device=rows.device) >= routing.counts.sum())[:, None]
        out = experts(rows.masked_fill(nobodys, 0.0), routing.counts)
        return combine(out.masked_fill(nobodys, 0.0), routing.weights, arranged)


class SparseMoE(nn.Module):
    """Router and experts as in Mixtral (2401.04088): softmax over all experts, the K largest, renormalised."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(hidden_size, intermediate_size, num_experts)
        self.dispatch = Dispatch()

    def forward(self, h: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """h `[B, T, D]` and which tokens are padding `[B, T]`, to `[B, T, D]` and what the router did."""
        x = h.flatten(0, 1)
        routing, stats = route(self.gate(x), self.num_experts_per_tok, None if padding is None else padding.flatten())
        return self.dispatch(x, routing, self.experts).view_as(h), stats


def route(logits: Tensor, top_k: int, padding: Tensor | None = None) -> tuple[Routing, RouterStats]:
    """Router logits `[R, E]` to where tokens go; probabilities in fp32, or fp64 if the logits are.

    Padding `[R]` goes nowhere and counts nowhere. All alike, it would fill the same few experts.
    """
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, ids = probabilities.topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    if padding is not None:
        nowhere = padding[:, None]
        probabilities, weights = probabilities.masked_fill(nowhere, 0.0), weights.masked_fill(nowhere, 0.0)
        ids = ids.masked_fill(nowhere, logits.shape[1])
    experts = torch.arange(logits.shape[1], device=ids.device)
    counts = (ids.flatten()[:, None] == experts).sum(0)
    return Routing(ids, weights, counts), RouterStats(probabilities.sum(0), counts)


def balance_loss(stats: Sequence[RouterStats], num_experts_per_tok: int, row_assignments: Tensor) -> Tensor:
    """This rank's part of a row's load-balancing loss, 0-dim; K when perfectly balanced (2101.03961, eq. 4 to 6).

    As transformers' `load_balancing_loss_func` with its attention mask: the tokens of all layers, without padding, as
    one set of N, of which expert e gets the share f_e (all K counted) with the mean probability P_e; the loss is
    E * sum_e f_e * P_e. `row_assignments` `[E]` are the assignments of all layers over the whole row; no gradient goes
    through them, so the parts of ranks that share a row add up, as do their gradients. A row of nothing but padding
    has the loss 0.
    """
    probabilities = torch.stack([s.probabilities for s in stats]).sum(0)
    assignments = row_assignments.to(probabilities.dtype)
    num_tokens = assignments.sum().clamp(min=1) / num_experts_per_tok
    return len(assignments) * ((assignments / num_tokens) * (probabilities / num_tokens)).sum()


class LayerSum(nn.Module):
    """The layer_sum seam: what the routers of all layers did, added up; here all layers are at hand. No parameters."""

    def forward(self, stats: Sequence[RouterStats]) -> RouterStats:
        probabilities = torch.stack([s.probabilities for s in stats]).sum(0)
        return RouterStats(probabilities, torch.stack([s.assignments for s in stats]).sum(0))


class RowPart(nn.Module):
    """The row_part seam: what is known of each token of a row to those whose hidden states are here. No parameters."""

    def forward(self, of_tokens: Tensor) -> Tensor:
        """`[B, T]` to `[B, T]` of the residual."""
        return of_tokens


class RowSum(nn.Module):
    """The row_sum seam: a part of a row's counts to the row's; here the part is the row. No parameters."""

    def forward(self, counts: Tensor) -> Tensor:
        """Integers of any shape, without gradient, summed over the ranks that share the row."""
        return counts


def init_experts(model: nn.Module, *, std: float) -> None:
    """Fill the experts of a model with normal(0, std), in module order. Does nothing on meta."""
    for module in model.modules():
        if isinstance(module, Experts):
            for weight in (module.w1, module.w3, module.w2):
                nn.init.normal_(weight, 0.0, std)


def balance_objection(layout: Layout) -> str | None:
    """Why rows laid end to end have no load-balancing loss, for the plugin of a family with `output_router_logits`."""
    if layout.micro_batch == 1 or not getattr(layout.model.config, "output_router_logits", False):
        return None
    return (
        f"the router's auxiliary loss is defined row by row and data.micro_batch {layout.micro_batch} lays rows end "
        f"to end; give --set data.micro_batch=1, or --set model.output_router_logits=false"
    )
