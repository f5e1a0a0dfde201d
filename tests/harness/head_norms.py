"""Families whose attention norms each query and key head after the projection, as Qwen3's does, dense and with experts.

Each is a family of zoo's with another attention: what a plugin of a third party would add.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from zoo.core.contracts.globs import find_modules
from zoo.models.common.norms import RMSNorm
from zoo.models.common.rope import rotate
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.mixtral.model import SPEC as MIXTRAL

ATTENTION = "model.layers.*.self_attn"
NORMS = (f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")


class NormedAttention(nn.Module):
    """An attention of zoo's with norms over the head size; they have one weight for all heads."""

    def __init__(self, plain):
        super().__init__()
        self.head_dim = plain.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = plain.q_proj, plain.k_proj, plain.v_proj, plain.o_proj
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=1e-5) for _ in "qk")
        self.core = plain.core

    def forward(self, h, cos, sin, mask):
        q, k, v = (self._heads(project(h)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(self.core(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x):
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


def normed(plain, name, **styles):
    """A family with head norms; `styles` are those of the norms in its plan, `heads` if not said."""

    def build(config):
        model = plain.build(config)
        for attention in find_modules(model, ATTENTION):
            model.set_submodule(attention, NormedAttention(model.get_submodule(attention)))
        return model

    def plan(config):
        made = plain.plan(config)
        return replace(made, tensor={**made.tensor, **(styles or dict.fromkeys(NORMS, "heads"))})

    return replace(
        plain,
        name=name,
        model_type=name,
        parse=lambda fields: plain.parse({**fields, "model_type": plain.model_type}),
        hub_config=lambda config: plain.hub_config(config) | {"model_type": name},
        override=lambda fields, over: {**fields, **over},
        build=build,
        plan=plan,
    )


DENSE = normed(LLAMA, "dense-head-norms")
SPARSE = normed(MIXTRAL, "sparse-head-norms")
