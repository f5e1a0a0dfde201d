"""How a block is run and what it keeps: everything, or its input only."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo import ModelConfig, ParallelPlan, replace_modules


class KeepAll:
    """The plain way: autograd keeps what it needs."""

    name: ClassVar[str] = "none"

    def apply(self, model: nn.Module, plan: ParallelPlan) -> nn.Module:
        """Nothing to change."""
        return model

    def saved_bytes(self, config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
        """About 16 widths per token and block: norms, q, k, v, out, residuals, and gate, up, product of the MLP.

        Counted for a SwiGLU block whose inner width is 3.5 times the model's, as in Llama-3.
        """
        return config.num_hidden_layers * tokens * config.hidden_size * bytes_per_value * 20


class RecomputeBlocks:
    """Activation checkpointing of whole blocks (Chen et al. 2016, arXiv 1604.06174)."""

    name: ClassVar[str] = "full"
    forwards: ClassVar[int] = 2

    def apply(self, model: nn.Module, plan: ParallelPlan) -> nn.Module:
        """Replace the seam that runs blocks."""
        replace_modules(model, plan.seams["block"], lambda _old: _RunTwice(), owner=self.name)
        return model

    def saved_bytes(self, config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
        """The input of each block, and one block's activations while it runs again."""
        inputs = config.num_hidden_layers * tokens * config.hidden_size * bytes_per_value
        return inputs + KeepAll().saved_bytes(config, tokens, bytes_per_value) // config.num_hidden_layers


class _RunTwice(nn.Module):
    """Runs a block now and again in backward. Holds no block, so parameter names stay."""

    def forward(self, block: nn.Module, *args: Any) -> Any:
        # No random numbers are drawn inside a block, so their state need not be kept.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
