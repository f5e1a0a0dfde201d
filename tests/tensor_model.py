"""Small models of every family, each with what tensor parallelism may get wrong, and steps under any layout."""

from __future__ import annotations

import numpy as np
import torch

from tests import sparse_model
from tests.sparse_model import whole
from zoo.core import order, weights
from zoo.core.batch import Row, collate
from zoo.core.contracts import IGNORE, ContextSetup, Setup
from zoo.core.job import OptimSection, ScheduleSection
from zoo.core.mesh import Degrees, Mesh
from zoo.core.optim import build_optimizer, build_schedule
from zoo.core.step import TrainState, train_step
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.mixtral.model import SPEC as MIXTRAL
from zoo.models.nemotron.model import SPEC as NEMOTRON
from zoo.models.nemotron_nas.model import SPEC as NAS
from zoo.plugins.attention.dense import Dense
from zoo.plugins.context.ring import Ring
from zoo.plugins.memory.policies import KeepAll, RecomputeBlocks
from zoo.plugins.parallel.context import ContextParallel
from zoo.plugins.parallel.expert import ExpertParallel
from zoo.plugins.parallel.fsdp import FullyShardedData
from zoo.plugins.parallel.tensor import TensorParallel

VOCAB, SEQ, ROWS = 24, 26, 4
"""26 tokens, and the 13 of a rank of cp 2, are no multiple of any tp here."""
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}


def _block(attention, ffn):
    parts = {"no_op": False, "replace_with_linear": False}
    return {"attention": parts | attention, "ffn": parts | ffn}


_LINEAR = {"replace_with_linear": True}
_BLOCKS = [
    _block({"n_heads_in_group": 2}, {"intermediate_size": 24}),
    _block(_LINEAR, {"intermediate_size": 8}),
    _block({"n_heads_in_group": 1}, _LINEAR),
    _block({"no_op": True}, {"intermediate_size": 16}),
]
_NAS = _SIZES | {"intermediate_size": None, "num_key_value_heads": None, "num_hidden_layers": 4, "rope_theta": 1e4}
MODELS = {
    "untied": (LLAMA, _SIZES | _BIASES | {"model_type": "llama", "tie_word_embeddings": False}),
    "tied": (LLAMA, _SIZES | {"model_type": "llama", "tie_word_embeddings": True}),
    "nemotron": (NEMOTRON, _SIZES | _BIASES | {"model_type": "nemotron", "partial_rotary_factor": 0.5}),
    "nas": (NAS, _NAS | _BIASES | {"model_type": "nemotron-nas", "block_configs": _BLOCKS}),
    "mixtral": (
        MIXTRAL,
        {k: v for k, v in _SIZES.items() if k != "head_dim"}
        | {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.05,
        },
    ),
}


def config(model):
    spec, fields = MODELS[model]
    return spec.parse(fields)


def source(model):
    """The model in memory that every layout starts from, in fp64; gains and biases are drawn too."""
    torch.manual_seed(7)
    built = MODELS[model][0].build(config(model)).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return built


def rows():
    """Rows of packed documents, one with padding."""
    draw = np.random.default_rng(3)
    result = []
    for documents in (((0, SEQ),), ((0, 5), (5, 6), (6, SEQ)), ((0, 13), (13, SEQ)), ((2, 20),)):
        tokens, labels = draw.integers(0, VOCAB, (2, SEQ))
        labels[draw.random(SEQ) < 0.3] = IGNORE
        labels[[stop - 1 for _, stop in documents]] = IGNORE
        result.append(Row(tokens=tokens, labels=labels, documents=documents))
    return result


class Run(sparse_model.Run):
    """A model under a layout on this rank, ready to step."""

    def __init__(self, degrees, model, *, sequence=True, memory="none", dtype="float64"):
        self.degrees = Degrees(**degrees)
        spec = MODELS[model][0]
        context = ContextSetup(schemes={None: Ring()}, windows={None: 2}) if self.degrees.cp > 1 else None
        master = "float32" if dtype == "bfloat16" else dtype
        self.setup = Setup(seq=SEQ, context=context, dtype=dtype, master_dtype=master, sequence_parallel=sequence)
        every = (ContextParallel(), ExpertParallel(), FullyShardedData(), TensorParallel())
        self.adapters = [a for a in every if a.applies(self.degrees.mapping(), self.setup)]
        self.mesh = Mesh(self.degrees, "cpu") if self.adapters else None
        self.model = order.build(
            spec,
            config(model),
            mesh=self.mesh,
            setup=self.setup,
            backend=Dense(),
            adapters=self.adapters,
            policy=RecomputeBlocks() if memory == "full" else KeepAll(),
            device=torch.device("cpu"),
        )
        weights.load_into(self.model, weights.ModuleSource(source(model)), ())
        optimizer = build_optimizer(self.model, OptimSection(lr=3e-3))
        self.state = TrainState(self.model, optimizer, build_schedule(ScheduleSection(steps=10)), lr=3e-3, clip=0.1)
        self.gradients = {}
        optimizer.register_step_pre_hook(lambda *_: self.gradients.update(whole(self.model, gradients=True)))

    def batches(self):
        """This rank's microbatches of one row each."""
        each = ROWS // self.degrees.dp
        first = each * self.mesh.rank("dp_shard") if self.mesh else 0
        result = []
        for row in rows()[first : first + each]:
            batch = collate([row])
            for adapter in self.adapters:
                batch = adapter.shard_batch(batch, self.mesh, self.setup)
            result.append(batch)
        return result

    def step(self):
        """One step: loss, gradient norm and report of all ranks together."""
        trained = sum(row.trained_tokens for row in rows())
        result = train_step(self.state, self.batches(), trained, ROWS)
        parts = {"loss": result.loss, **result.report}
        if self.mesh:
            for part in parts.values():
                torch.distributed.all_reduce(part)
        return {**parts, "grad_norm": result.grad_norm}


def two_steps(degrees, model, sequence=True, memory="none"):
    """Everything that two steps leave: numbers of each, gradients of each, parameters."""
    run = Run(degrees, model, sequence=sequence, memory=memory)
    result = {}
    for step in (1, 2):
        result |= {f"{step}.{name}": value for name, value in run.step().items()}
        result |= {f"{step}.gradient.{name}": value for name, value in run.gradients.items()}
    return result | {f"parameter.{name}": value for name, value in whole(run.model).items()}
